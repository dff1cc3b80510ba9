"""``mooncake-connector simulate``: a trace played to engines that only cost time."""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.routing import Routing
from mooncake_connector.scheduler.policy.scheduling import Admission, Scheduling
from mooncake_connector.scheduler.simulator import plot, report, trace
from mooncake_connector.scheduler.simulator.presets import PRESETS, preset
from mooncake_connector.scheduler.simulator.setup import Setup, parse_pools
from mooncake_connector.scheduler.simulator.world import World


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    parser.epilog = (
        "Several values for --xpyd, --routing or --admission are compared, each with each. It is the proxy's "
        "own conductor that places requests; engines are models, see docs/scheduling.md."
    )
    add = parser.add_argument
    add("--trace", metavar="FILE", required=True, help="requests in Mooncake's format: .jsonl or .jsonl.gz")
    add("--requests", metavar="N", help="only the first N")
    add("--speed", metavar="X", default="1", help="the trace's clock runs X times as fast (1)")
    add(
        "--spread", metavar="S", default="3", help="arrivals are spread over S seconds, 0: as in the file (3)"
    )
    add("--preset", metavar="NAME", default="h200-8b", help=f"engines: {', '.join(PRESETS)} (h200-8b)")
    add("--xpyd", metavar="xPyD", nargs="+", default=["2P2D"], help="pools: 2P2D, or 4C: coupled engines")
    add("--routing", metavar="MODE", nargs="+", default=["conductor"], help=", ".join(get_args(Routing)))
    add("--admission", metavar="MODE", nargs="+", default=["none"], help=", ".join(get_args(Admission)))
    add(
        "--coupled-prefill",
        default="chunked",
        help="chunked (default), or whole: decode stands still meanwhile",
    )
    add("--order", default="concurrent", help="concurrent (default) or serial, as of the proxy")
    add("--first-token", default="decode", help="decode (default) or prefill, as of the proxy")
    add("--ttft", metavar="S", default="30", help="promised seconds to the first token (30)")
    add("--tbt", metavar="S", default="0.1", help="promised seconds between tokens (0.1)")
    add(
        "--prior",
        default="generic",
        help="what the conductor believes at first: generic (default), calibrated",
    )
    add("--kv-tokens", metavar="N", help="tokens of KV of one engine (the preset's)")
    add(
        "--cache-tokens",
        metavar="N",
        help="tokens of former prompts that it keeps in host memory (the preset's)",
    )
    add("--no-prefix-cache", action="store_true", help="engines forget every prompt")
    add("--seed", metavar="N", default="0", help="of everything random (0)")
    add("--json", metavar="FILE", help="write all figures, and every request")
    add("--plot", metavar="FILE.svg", help="draw loads over time, TTFT and TBT (needs matplotlib)")


def run(options: Mapping[str, Any]) -> str:
    """Simulate what the options say; returns the table.

    Raises:
        ConfigError: An option does not fit.
    """
    if options["plot"]:
        plot.pyplot()  # before any work
    jobs = trace.jobs(
        trace.read(Path(options["trace"]), limit=_number(options, "requests", int, least=1)),
        speed=_number(options, "speed", float, above=0),
        spread=_number(options, "spread", float, least=0),
        seed=_number(options, "seed", int),
    )
    worlds = []
    for setup in setups(options):
        world = World(setup, jobs)
        world.run()
        worlds.append(world)
    found = [report.summary(world) for world in worlds]
    if options["json"]:
        _write(Path(options["json"]), options, worlds, found)
    if options["plot"]:
        names = [f"{one['system']} {one['routing']} {one['admission']}" for one in found]
        plot.loads(worlds, names, Path(options["plot"]))
    wall = sum(world.wall for world in worlds)
    costs = worlds[0].setup.costs
    return "\n".join(
        [
            report.table(found),
            f"{len(jobs)} requests each, {60 * len(jobs) * len(worlds) / wall:,.0f} a minute; "
            f"arrivals {_spread(options)}; the conductor began with {worlds[0].setup.prior} priors",
            f"engines: {costs.source}",
        ]
    )


def setups(options: Mapping[str, Any]) -> list[Setup]:
    """One for each combination of pools, routing and admission."""
    costs = preset(options["preset"])
    for option in ("kv_tokens", "cache_tokens"):
        if (tokens := _number(options, option, int, least=0)) is not None:
            costs = msgspec.structs.replace(costs, **{option: tokens})
    slo = Slo(
        ttft=_number(options, "ttft", float, above=0),
        tbt=_number(options, "tbt", float, above=0),
    )
    for option, known in CHOICES.items():
        for value in options[option] if isinstance(options[option], list) else [options[option]]:
            if value not in known:
                raise ConfigError(f"{_name(option)} {value}: choose one of {', '.join(known)}")
    return [
        Setup(
            costs=costs,
            **parse_pools(pools),
            whole=options["coupled_prefill"] == "whole",
            order=options["order"],
            first_token=options["first_token"],
            scheduling=Scheduling(routing=routing, admission=admission, slo=slo),
            prior=options["prior"],
            prefix_caching=not options["no_prefix_cache"],
            seed=_number(options, "seed", int),
        )
        for pools, routing, admission in itertools.product(
            options["xpyd"], options["routing"], options["admission"]
        )
    ]


CHOICES: dict[str, tuple[str, ...]] = {
    "routing": get_args(Routing),
    "admission": get_args(Admission),
    "coupled_prefill": ("chunked", "whole"),
    "order": ("concurrent", "serial"),
    "first_token": ("decode", "prefill"),
    "prior": ("generic", "calibrated"),
}


def _number(
    options: Mapping[str, Any],
    option: str,
    kind: type[Any],
    *,
    least: float | None = None,
    above: float | None = None,
) -> Any:
    text = options[option]
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{_name(option)} {text}: give {what}") from error
    if (least is not None and not value >= least) or (above is not None and not value > above):
        raise ConfigError(
            f"{_name(option)} {text}: give {'at least' if above is None else 'more than'} "
            f"{least if above is None else above}"
        )
    return value


def _name(option: str) -> str:
    return "--" + option.replace("_", "-")


def _spread(options: Mapping[str, Any]) -> str:
    seconds = float(options["spread"])
    return f"spread over {seconds:g} s of the trace's clock" if seconds else "at the file's ticks"


def _write(file: Path, options: Mapping[str, Any], worlds: list[World], found: list[dict[str, Any]]) -> None:
    document = {
        "options": dict(options),
        "simulations": [
            one | {"samples": world.samples, "each": report.requests(world.tasks)}
            for world, one in zip(worlds, found, strict=True)
        ],
    }
    try:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(document)))
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror or error}") from error
