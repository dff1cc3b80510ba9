"""Requests to replay: Mooncake's trace files, and prompts made up to measure.

A trace's line is a JSON object: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids`: the
chained ids of the prompt's 512-token blocks, the last of which may be begun only (Mooncake, FAST'25).
"""

import gzip
import random
from collections.abc import Iterable
from pathlib import Path

import msgspec

from mooncake_connector.errors import ConfigError

BLOCK = 512
TICK = 3.0  # arrivals of Mooncake's traces sit on multiples of it, seconds


class Line(msgspec.Struct):
    """One line of a trace file."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


class Job(msgspec.Struct, frozen=True):
    """One request to come.

    Attributes:
        at: when it arrives, seconds from the beginning.
        prompt, output: tokens.
        keys: of the prompt's whole blocks of `BLOCK` tokens.
    """

    at: float
    prompt: int
    output: int
    keys: tuple[int, ...] = ()


def read(file: Path, *, limit: int | None = None) -> list[Line]:
    """The first `limit` lines of a trace; ``.gz`` is understood.

    Raises:
        ConfigError: There is no such file, or a line is not of this format.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--trace {file}: {error.strerror or error}") from error
    decode = msgspec.json.Decoder(Line).decode
    lines = []
    for number, text in enumerate(raw.splitlines()[:limit], start=1):
        try:
            line = decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"--trace {file}, line {number}: {error}") from error
        if line.input_length < 1 or line.output_length < 1:
            raise ConfigError(f"--trace {file}, line {number}: a length is below 1")
        lines.append(line)
    if not lines:
        raise ConfigError(f"--trace {file} has no requests")
    return lines


def jobs(lines: Iterable[Line], *, speed: float = 1.0, spread: float = TICK, seed: int = 0) -> list[Job]:
    """A trace's requests by time.

    Args:
        speed: the trace's clock runs this much faster.
        spread: each arrival is put off by a random time below this many seconds of the trace's clock, for
            traces whose arrivals sit on ticks; 0 keeps the bursts.
    """
    rng = random.Random(seed)
    found = [
        Job(
            (line.timestamp / 1e3 + (rng.random() * spread if spread else 0.0)) / speed,
            line.input_length,
            line.output_length,
            tuple(line.hash_ids[: line.input_length // BLOCK]),
        )
        for line in lines
    ]
    return sorted(found, key=lambda job: job.at)


def made_up(
    *,
    prompt: int,
    output: int = 512,
    cached: float = 0.5,
    rate: float,
    count: int,
    groups: int = 0,
    seed: int = 0,
) -> list[Job]:
    """Prompts of one length that arrive at random (Poisson).

    Args:
        cached: the part of each prompt that it shares with the others of its group.
        rate: requests per second.
        groups: how many different shared beginnings there are; 0 means a tenth of `count`.
    """
    rng = random.Random(seed)
    groups = groups or max(1, count // 10)
    blocks = prompt // BLOCK
    shared = round(blocks * cached)
    at = 0.0
    found = []
    for number in range(count):
        at += rng.expovariate(rate)
        group = rng.randrange(groups)
        begin = range(group * blocks, group * blocks + shared)
        own = range((groups + number) * blocks, (groups + number) * blocks + blocks - shared)
        found.append(Job(at, prompt, output, (*begin, *own)))
    return found
