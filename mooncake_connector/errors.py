"""Every exception this package raises; each message names what is wrong and the mend."""


class MooncakeError(Exception):
    """Base class of all errors raised by mooncake_connector."""


class ConfigError(MooncakeError, ValueError):
    """A setting is missing, unknown or out of range; the message names the setting and the mend."""


class IncompatibleError(MooncakeError):
    """Prefill and decode can't exchange KV; the message has both sides' values."""


class TransportError(MooncakeError):
    """Bytes could not be moved: the link broke, or the target refused the write."""


class TransferError(TransportError):
    """A transfer ended before all its bytes had landed; nothing of it is under way any more."""


class EngineStartError(MooncakeError):
    """An engine process did not come up; the message carries the end of its log."""
