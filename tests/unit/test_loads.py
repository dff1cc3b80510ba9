"""Loads that workers report directly, and once more by their step outputs."""

from mooncake_connector.kv_transfer.messages import LoadReport
from mooncake_connector.kv_transfer.session import Outcome
from mooncake_connector.kv_transfer.vllm.loads import Loads


def report(request_id: str, outcome: Outcome = Outcome.LOADED, *, token_only: bool = False) -> LoadReport:
    return LoadReport(request_id, outcome, "", "tcp", 1, 0, 0.0, 0.0, token_only=token_only)


def test_a_load_is_over_when_all_ranks_have_it_and_vllm_is_told_once() -> None:
    loads = Loads()
    loads.begin("r", 2, token_only=False)
    assert not loads.reported(report("r"))
    assert loads.reported(report("r"))
    assert loads  # the step outputs are still to come
    assert loads.in_outputs({"r"}) == set()
    assert not loads


def test_a_failed_load_is_left_to_the_step_outputs() -> None:
    loads = Loads()
    loads.begin("r", 2, token_only=False)
    assert not loads.reported(report("r", Outcome.FAILED))
    assert not loads.reported(report("r"))
    assert loads.in_outputs({"r"}) == {"r"}
    assert not loads


def test_a_report_that_comes_after_the_step_outputs_tells_nothing_new() -> None:
    loads = Loads()
    loads.begin("r", 1, token_only=False)
    assert loads.in_outputs({"r"}) == {"r"}
    assert not loads.reported(report("r"))
    assert loads.in_outputs({"of another connector"}) == {"of another connector"}


def test_a_first_token_alone_is_never_in_the_step_outputs() -> None:
    loads = Loads()
    loads.begin("r", 2, token_only=True)
    assert not loads.reported(report("r", Outcome.FAILED, token_only=True))
    assert loads.reported(report("r", token_only=True))
    assert not loads
