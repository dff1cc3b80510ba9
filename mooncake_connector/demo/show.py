"""What the demo prints: the engines' start, the answers, the table."""

import statistics
import time
from collections.abc import Sequence

import msgspec
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mooncake_connector.demo.client import Answer, Ask
from mooncake_connector.errors import EngineStartError
from mooncake_connector.scheduler.actuator.local import LocalProcess

console = Console(highlight=False)


class Row(msgspec.Struct, frozen=True):
    """One prompt length of the table; times in seconds, one entry per round."""

    prompt_tokens: int
    alone: list[float]
    through: list[float]
    transfers: list[dict[str, object]]


def await_ready(processes: Sequence[LocalProcess], timeout: float) -> None:
    """Show how started `processes` come up until all are ready.

    Raises:
        EngineStartError: one ended, or was not ready after `timeout` seconds.
    """
    started = time.monotonic()
    ready: dict[str, float] = {}
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while len(ready) < len(processes):
            for process in processes:
                if process.name in ready:
                    continue
                if not process.alive() or time.monotonic() - started > timeout:
                    process.wait_ready(timeout=0.0)  # raises with the log's end
                if process.healthy():
                    ready[process.name] = time.monotonic() - started
            live.update(_progress(processes, ready, time.monotonic() - started))
            time.sleep(0.2)
    if not all(process.alive() for process in processes):
        raise EngineStartError("an engine ended right after its start")


def _progress(processes: Sequence[LocalProcess], ready: dict[str, float], now: float) -> Group:
    grid = Table.grid(padding=(0, 2))
    for process in processes:
        if process.name in ready:
            state = Text(f"ready after {ready[process.name]:.0f} s", style="green")
            detail = Text(process.url, style="dim")
        else:
            state = Text(f"starting, {now:.0f} s", style="yellow")
            detail = Text(process.last_line()[:90], style="dim", overflow="ellipsis", no_wrap=True)
        grid.add_row(Text(f"  {process.name}"), state, detail)
    return Group(grid)


def answer(request: Ask, alone: Answer, through: Answer) -> bool:
    """Print one prompt with its answer; returns whether both answers have the same tokens."""
    same = alone.token_ids == through.token_ids
    prompt = request.prompt if len(request.prompt) <= 60 else f"{request.prompt[:57]}..."
    size = f", {through.prompt_tokens} tokens" if through.prompt_tokens else ""
    console.print(f"[bold]{request.title}[/bold][dim]{size}[/dim]  {escape(prompt)}")
    console.print(Text(f"  {_one_line(through.text)}", style="cyan"))
    if same:
        console.print("  [green]same tokens as one engine[/green]")
    else:
        console.print(f"  [red]differs from one engine:[/red] {escape(_one_line(alone.text))}")
    return same


def table(rows: Sequence[Row]) -> None:
    """Print medians per prompt length."""
    title = "Time to first token (ms, medians) and what was moved"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("tokens", "one engine", "P/D", "added", "KV (KiB)", "path", "early", "D waited"):
        out.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        alone, through = statistics.median(row.alone), statistics.median(row.through)
        last = row.transfers[-1] if row.transfers else {}
        out.add_row(
            str(row.prompt_tokens),
            _ms(alone),
            _ms(through),
            _ms(through - alone),
            _kib(last.get("bytes")),
            str(last.get("path") or "-"),
            _share(last),
            _median_ms(row.transfers, "wait_ms"),
        )
    console.print(out)
    console.print("[dim]early: share of the KV sent before prefill ended; D waited: for its KV, in ms[/dim]")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in text)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _median_ms(transfers: Sequence[dict[str, object]], name: str) -> str:
    values = [float(str(transfer[name])) for transfer in transfers if name in transfer]
    return f"{statistics.median(values):.1f}" if values else "-"


def _kib(nbytes: object) -> str:
    return f"{int(str(nbytes)) / 1024:,.0f}" if nbytes is not None else "-"


def _share(transfer: dict[str, object]) -> str:
    early, total = transfer.get("early_bytes"), transfer.get("bytes")
    if early is None or not total:
        return "-"
    return f"{100 * int(str(early)) / int(str(total)):.0f} %"
