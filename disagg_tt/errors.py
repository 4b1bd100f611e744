"""Every error that disagg_tt raises on purpose, each with the value seen, the values allowed and the remedy.

DisaggError                       exit code 1
|- InputError                     exit code 2: the user can mend it, nothing has been started
|  |- PromptError                 a prompt that is empty or too long
|  |- CheckpointError             a checkpoint that is missing, damaged, or not a Llama
|  |- RankBindingError            a rank binding or mesh descriptor that does not make a prefill and a decode mesh
|  `- PlanError                   a model and cache that do not fit, or cannot be split over, the mesh
|- DeviceError                    a call that the device rejects, or that hardware would hang on or corrupt silently
|  `- NotEmulatedError            a call that ttnn may accept and the emulator does not have
|- StreamError                    a K/V stream that broke its protocol
|  `- RefusedError                the decode side does not want a request any more; nothing is broken
|- PeerError                      the other rank died, hangs, never came, or failed (its reason is in the message)
`- OverloadError                  a server that cannot take one more request now; says when to come again
"""


class DisaggError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what a command returns when one reaches it."""

    exit_code = 1


class InputError(DisaggError):
    """A value given by the user is wrong; raised before any device is touched."""

    exit_code = 2


class PromptError(InputError):
    """A prompt is empty or longer than the sequence limit."""


class CheckpointError(InputError):
    """A checkpoint folder is missing, damaged, or of another architecture."""


class RankBindingError(InputError):
    """A rank binding, its roles or its mesh descriptor cannot make one prefill and at least one decode mesh."""


class PlanError(InputError):
    """The model or its cache does not fit the mesh's memory, or cannot be split over its chips."""


class DeviceError(DisaggError, RuntimeError):
    """A device call is not acceptable: rejected by ttnn's rules, or one that hardware would hang on or corrupt.

    A RuntimeError too, because that is what ttnn raises and scripts catch.
    """


class NotEmulatedError(DeviceError):
    """A call that ttnn may well accept, but that the emulator does not have; the message says what it has."""


class StreamError(DisaggError):
    """A K/V stream broke its protocol: wrong order, wrong size, wrong metadata."""


class RefusedError(StreamError):
    """The decode side does not take a request, which was cancelled meanwhile; the stream can be used for the next."""


class PeerError(DisaggError):
    """The other rank died, hangs, never came, or reported a failure."""


class OverloadError(DisaggError):
    """A server cannot take the request now: its queue is full (`unavailable` False), or no rank serves (True).

    `retry_after_s` is when it is worth another try, in s.
    """

    def __init__(self, message: str, *, retry_after_s: float, unavailable: bool = False):
        super().__init__(message)
        self.retry_after_s, self.unavailable = retry_after_s, unavailable
