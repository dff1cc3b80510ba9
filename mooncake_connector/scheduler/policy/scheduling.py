"""Settings of the conductor."""

from typing import Literal

import msgspec

from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.routing import Routing

Admission = Literal["per_request", "predicted", "early", "baseline", "none"]


class SloRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A promise to some of the requests.

    Attributes:
        slo: the promise.
        model: of requests for this model; empty for all.
        service_class: of clients of this class; empty for all.
    """

    slo: Slo
    model: str = ""
    service_class: str = ""


class Scheduling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How engines are chosen, and who is let in.

    Attributes:
        routing: how engines are chosen; see `Router`.
        admission: who is let in; see `Gate`.
        replication_threshold: a prefix is copied if the best holder has more than so many times the own one,
            and if that is faster than computing it.
        min_prefill_tokens: shorter prompts are computed by decode; 0 sends none that way.
        emergency_seconds: predicted seconds of queued prompts per engine from which nobody is let in.
        emergency_kv: the same for tokens of all answers in flight, as a multiple of what decode can hold.
        reserve: share of TTFT, TBT and KV that is kept for the more urgent, and for tenants that had no more
            than their part, when there are any; ``per_request`` only.
        caution: standard deviations by which more KV is expected to be taken than on average; ``per_request``
            only.
        favour_cheap: share of what is left of TTFT, TBT and KV that the dearest requests leave to the others,
            0 to 1: with more, fewer are rejected, and those are the long ones; of TTFT only while more comes
            than prefill can compute; ``per_request`` only.
        slo: promised to those that no rule names.
        slos: the first that fits counts.
    """

    routing: Routing = "conductor"
    admission: Admission = "per_request"
    replication_threshold: float = 1.25
    min_prefill_tokens: int = 0
    emergency_seconds: float = 120.0
    emergency_kv: float = 2.0
    reserve: float = 0.1
    caution: float = 1.0
    favour_cheap: float = 0.7
    slo: Slo = Slo()
    slos: tuple[SloRule, ...] = ()

    def slo_of(self, model: str, service_class: str = "") -> Slo:
        """What a request of this class for this model is promised."""
        for rule in self.slos:
            if rule.model in ("", model) and rule.service_class in ("", service_class):
                return rule.slo
        return self.slo
