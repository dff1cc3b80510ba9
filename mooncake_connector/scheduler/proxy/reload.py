"""New settings for a proxy that runs: all of them or none, and no request notices."""

import logging
from collections.abc import Callable, Sequence

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.engines.pool import Side
from mooncake_connector.scheduler.proxy import tls
from mooncake_connector.scheduler.proxy.membership import Membership
from mooncake_connector.scheduler.proxy.settings import DERIVED, RELOADABLE, InForce, ProxySettings, spelled

log = logging.getLogger(__name__)


class Reloader:
    """Reads the settings again and puts them in force.

    Args:
        load: reads them; raises `ConfigError` if something is wrong.
        in_force: those that count now.
        membership: is told of engines that came or went.
        certificate: is given new files; None: the proxy speaks HTTP.
        followers: called with the new settings; they don't fail.
    """

    def __init__(
        self,
        load: Callable[[], ProxySettings],
        in_force: InForce,
        membership: Membership,
        certificate: tls.Certificate | None,
        followers: Sequence[Callable[[ProxySettings], None]],
    ) -> None:
        self._load = load
        self._in_force = in_force
        self._membership = membership
        self._certificate = certificate
        self._followers = followers

    def reload(self) -> list[str]:
        """Take the settings as they are now; returns the names of those that changed.

        Engines that are new in the pools' settings are added, those that are not there any more are removed;
        what the admin API added stays.

        Raises:
            ConfigError: they are wrong, or something changed that can't. Nothing changed then.
        """
        new, old = self._load(), self._in_force.settings
        changed = [name for name in new.__struct_fields__ if getattr(new, name) != getattr(old, name)]
        _check(old, new, changed)
        if self._certificate:
            tls.check(new.tls_cert, new.tls_key)
            self._certificate.replace(new.tls_cert, new.tls_key)
        self._in_force.settings = new
        for follow in self._followers:
            follow(new)
        before, after = _sides(old), _sides(new)
        for url in before.keys() | after.keys():
            if before.get(url) != after.get(url):
                self._membership.become(url, after.get(url))
        found = [name for name in changed if name not in DERIVED]
        log.info("settings were read again: %s", f"{', '.join(found)} changed" if found else "none changed")
        return found


def _check(old: ProxySettings, new: ProxySettings, changed: list[str]) -> None:
    stuck = [spelled(name) for name in changed if name not in RELOADABLE and name not in DERIVED]
    # Somebody must listen, or speak TLS, from the start.
    stuck += [
        f"{spelled(name)} (from none to some, or back)"
        for name in ("admin_keys", "tls_cert")
        if bool(getattr(old, name)) != bool(getattr(new, name))
    ]
    if (old.scheduling.admission == "baseline") != (new.scheduling.admission == "baseline"):
        stuck.append(f"{spelled('scheduling.admission')} (from or to baseline)")
    if stuck:
        raise ConfigError(
            f"{', '.join(stuck)} can't change while the proxy runs: put back what it was, or start anew"
        )


def _sides(settings: ProxySettings) -> dict[str, Side]:
    found: dict[str, Side] = dict.fromkeys(settings.prefill, "prefill")
    return found | dict.fromkeys(settings.decode, "decode")
