"""Which NICs a memory location uses: the preferred ones, and those that take over or help out. Pure."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import msgspec

from mooncake_connector.errors import ConfigError
from mooncake_connector.kv_transfer.topology.model import Distance, Kind, Nic, Topology

WEIGHT = {Distance.PIX: 1.0, Distance.PXB: 1.25, Distance.PHB: 1.5, Distance.NODE: 2.0, Distance.SYS: 4.0}
"""How much longer a byte is taken to need from there. A judgement, not a measurement: what is measured, each
rail's bandwidth, corrects it while running."""

SECONDARY = 2.0
"""Penalty of a secondary NIC that a user named."""

ANYWHERE = "*"
"""Stands for every location that the host does not have, such as a GPU that sysfs does not show."""

_WILDCARDS = re.compile(r"[*?\[]")
_LOCATION = re.compile(r"(cpu|cuda):\d+|\*")


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """Names of NICs, the best first; no name is in both.

    As JSON it is ``[[preferred, ...], [secondary, ...]]``, Mooncake's shape.
    """

    preferred: tuple[str, ...] = ()
    secondary: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, the best first."""
        return self.preferred + self.secondary


class NicRules(msgspec.Struct, frozen=True):
    """What a user decided about NICs.

    Attributes:
        allow: names or patterns (``mlx5_*``); where given, no other NIC is used.
        deny: names or patterns that are never used.
        override: location -> choice; these win over what the matrix would have computed.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    override: dict[str, Choice] = {}

    @classmethod
    def of(
        cls,
        allow: Iterable[str] = (),
        deny: Iterable[str] = (),
        override: Path | str | Mapping[str, Any] | None = None,
    ) -> Self:
        """Rules, with the override from a JSON file or a mapping in Mooncake's shape.

        Raises:
            ConfigError: The override can't be read, or its shape is wrong.
        """
        return cls(tuple(allow), tuple(deny), _load(override) if override is not None else {})

    def admits(self, nic: Nic) -> bool:
        """Whether allow and deny let a NIC be used."""
        return (not self.allow or _matches(nic, self.allow)) and not _matches(nic, self.deny)

    def check(self, topology: Topology) -> None:
        """Refuse names that the host does not have: once, at the start, for NICs may go away later.

        Raises:
            ConfigError: Names the list, the name in it, and what there is.
        """
        nics = _of_kind(topology, None)
        there = ", ".join(nic.name for nic in nics) or "none"
        for title, patterns in (("allow", self.allow), ("deny", self.deny)):
            for pattern in patterns:
                if not _WILDCARDS.search(pattern) and not any(_matches(nic, [pattern]) for nic in nics):
                    raise ConfigError(
                        f"the NIC {title} list names {pattern!r}, which this host does not have: take one of "
                        f"its NICs ({there}) or a pattern"
                    )
        if self.allow and not any(_matches(nic, self.allow) for nic in nics):
            raise ConfigError(
                f"the NIC allow list {', '.join(self.allow)} matches none of this host's NICs ({there})"
            )
        by_name = {nic.name: nic for nic in nics}
        for location, choice in self.override.items():
            for name in choice.names:
                if name not in by_name:
                    raise ConfigError(
                        f"the topology override names {name!r} for {location}, which this host does not "
                        f"have: take one of its NICs ({there})"
                    )
                if not self.admits(by_name[name]):
                    raise ConfigError(
                        f"the topology override names {name!r} for {location}, which the allow or deny list "
                        "excludes: change one of them"
                    )


class Matrix(msgspec.Struct, frozen=True):
    """For each memory location the NICs that bytes go over, all of them active.

    Attributes:
        choices: by location; `ANYWHERE` stands for those that are not there.
        penalties: location -> NIC -> 1 for a preferred NIC, more for a farther one.
    """

    choices: dict[str, Choice]
    penalties: dict[str, dict[str, float]]

    @classmethod
    def of(cls, topology: Topology, rules: NicRules | None = None, kind: Kind | None = None) -> Self:
        """The matrix of a host as it is now.

        Args:
            topology: the host.
            rules: what the user decided; names in it that are not there (any more) are passed over.
            kind: of the NICs; None: rdma if there is any, else tcp.
        """
        rules = rules or NicRules()
        nics = [nic for nic in _of_kind(topology, kind) if nic.active and rules.admits(nic)]
        usable = {nic.name for nic in nics}
        choices, penalties = {}, {}
        for location in dict.fromkeys((*topology.locations, *rules.override, ANYWHERE)):
            if given := rules.override.get(location):
                choice = Choice(_only(given.preferred, usable), _only(given.secondary, usable))
                penalty = dict.fromkeys(choice.preferred, 1.0) | dict.fromkeys(choice.secondary, SECONDARY)
            else:
                choice, penalty = _choose(topology, location, nics)
            choices[location], penalties[location] = choice, penalty
        return cls(choices, penalties)

    def choice(self, location: str) -> Choice:
        """The NICs of a location."""
        return self.choices.get(location, self.choices[ANYWHERE])

    def penalty(self, location: str, nic: str) -> float:
        """1 for a preferred NIC, more the farther it is; infinite for one that is not to be used.

        A NIC's speed is not in it: that belongs to the bandwidth of its rails.
        """
        return self.penalties.get(location, self.penalties[ANYWHERE]).get(nic, math.inf)


def _choose(topology: Topology, location: str, nics: Sequence[Nic]) -> tuple[Choice, dict[str, float]]:
    """Preferred are the NICs as near as the one that would be done first, and at least half as fast."""
    if not nics:
        return Choice(), {}
    slowest = min((nic.bandwidth for nic in nics if nic.bandwidth), default=1.0)
    speed = {nic.name: nic.bandwidth or slowest for nic in nics}
    weight = {}
    for nic in nics:
        distance = topology.distance(location, nic)
        weight[nic.name] = 1.0 if distance is None else WEIGHT[distance]
    ranked = sorted(speed, key=lambda name: (weight[name] / speed[name], weight[name]))
    best = ranked[0]
    preferred = [n for n in ranked if weight[n] == weight[best] and 2 * speed[n] >= speed[best]]
    choice = Choice(tuple(preferred), tuple(n for n in ranked if n not in preferred))
    return choice, {name: max(1.0, weight[name] / weight[best]) for name in ranked}


def _of_kind(topology: Topology, kind: Kind | None) -> list[Nic]:
    kind = kind or topology.kind()
    return [nic for nic in topology.nics if nic.kind == kind]


def _matches(nic: Nic, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (nic.name, nic.device))


def _only(names: tuple[str, ...], usable: set[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in usable)


def _load(source: Path | str | Mapping[str, Any]) -> dict[str, Choice]:
    source = Path(source) if isinstance(source, str) else source
    named = f"topology override {source}" if isinstance(source, Path) else "topology override"
    shape = '{"cpu:0": [["mlx5_0"], ["mlx5_1"]]}'
    try:
        raw = msgspec.json.decode(source.read_bytes()) if isinstance(source, Path) else source
        lists = msgspec.convert(raw, dict[str, tuple[tuple[str, ...], tuple[str, ...]]])
    except OSError as error:
        raise ConfigError(f"{named} can't be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{named}: {error}; expected is {shape}, preferred and secondary NICs") from error
    for location, (preferred, secondary) in lists.items():
        if not _LOCATION.fullmatch(location):
            raise ConfigError(f"{named}: location {location!r} must be cpu:N, cuda:N or {ANYWHERE}")
        names = preferred + secondary
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{named}: {location} names {twice!r} twice; expected is {shape}")
    return {location: Choice(*pair) for location, pair in lists.items()}
