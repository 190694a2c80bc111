"""The ways to compute attention, and which of them a run takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxtune.core.errors import RequestError
from jaxtune.models.attention import attend
from jaxtune.models.attention_cudnn import attend_cudnn
from jaxtune.models.attention_heads import attend_heads
from jaxtune.models.attention_ring import attend_ring
from jaxtune.models.attention_splash import LANES, attend_splash
from jaxtune.models.config import ModelConfig
from jaxtune.parallel.mesh import SEQUENCE_AXIS


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        attend: (q, k, v, where, prefix, *, scale, softcap, sinks) → [B, T, N, H], as
            `attention.attend`.
        reads_mask: whether it reads `where.mask`; the others see segments, positions and window.
    """

    attend: Callable[..., jax.Array]
    reads_mask: bool = False


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "xla": Backend(attend, reads_mask=True),
        "heads": Backend(attend_heads, reads_mask=True),
        "splash": Backend(attend_splash),
        "splash_interpreted": Backend(functools.partial(attend_splash, interpret=True)),
        "cudnn": Backend(attend_cudnn),
        "ring": Backend(attend_ring),
    }
)
# What a config may ask for; "auto" is `choose`'s to decide.
NAMES = ("auto", "xla", "splash", "cudnn", "ring")


def backend(name: str, cached: bool) -> Backend:
    """Returns the back end of `ModelConfig.attention`.

    "auto" is "xla" where nobody has chosen, and with a cache, whose new tokens are few, the masks
    are small and the kernels do not apply.
    """
    if name == "auto" or (cached and not BACKENDS[name].reads_mask):
        name = "xla"
    return BACKENDS[name]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a choice depends on, besides the model.

    Attributes:
        platform: "tpu", "gpu" or "cpu", of the devices that the program is compiled for.
        tokens: T, of a row.
        prefix: whether the method adds keys that every token sees.
        packed: whether a row may hold several segments.
        sequence: over how many devices the tokens of a row are spread.
        capability: compute capability of an NVIDIA GPU, (major, minor); None elsewhere.
        branches: whether completions share a prompt in a row.
    """

    platform: str
    tokens: int
    prefix: bool = False
    packed: bool = True
    sequence: int = 1
    capability: tuple[int, int] | None = None
    branches: bool = False


# Of a GPU that is planned for: an A100's.
PLANNED_CAPABILITY = "8.0"


def setting_on(
    mesh: Mesh | AbstractMesh,
    platform: str,
    tokens: int,
    *,
    prefix: bool,
    packed: bool,
    branches: bool = False,
) -> Setting:
    """Returns the Setting on a mesh of a platform; its devices may be described, or none."""
    if isinstance(mesh, AbstractMesh):
        capability = PLANNED_CAPABILITY if platform == "gpu" else ""
    else:
        capability = getattr(mesh.devices.flat[0], "compute_capability", "")
    numbers = str(capability).split(".")
    known = len(numbers) == 2 and all(n.isdigit() for n in numbers)
    return Setting(
        platform,
        tokens,
        prefix,
        packed,
        mesh.shape[SEQUENCE_AXIS],
        (int(numbers[0]), int(numbers[1])) if known else None,
        branches,
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """The back end of a run.

    Attributes:
        name: of `BACKENDS`.
        reason: why, in a few words.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(config: ModelConfig, setting: Setting) -> Choice:
    """Returns the back end that `config.attention` asks for; "auto" takes the fastest that applies.

    Raises:
        RequestError: one was named that cannot compute this model's attention here.
    """
    name = config.attention
    if setting.branches and config.follows_length:
        raise RequestError(
            "completions would share the keys of their prompt, whose angles follow the length of "
            "each in this model; set data.packing to False",
            key="data.packing",
        )
    if setting.branches and setting.sequence > 1:
        raise RequestError(
            f"completions share their prompt, which no back end knows that spreads a row over "
            f"{setting.sequence} devices (mesh.sequence); set data.packing to False, or "
            "mesh.sequence to 1",
            key="data.packing",
        )
    if name != "auto":
        reason = REFUSALS[name](config, setting) if name in REFUSALS else None
        if reason is not None:
            raise RequestError(f"{name}: {reason}; use auto", key="model.attention")
        return Choice(name, "as configured")
    if setting.sequence > 1:
        return Choice("ring", f"mesh.sequence spreads each row over {setting.sequence} devices")
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(setting.platform)
    if kernel is None:
        return Choice("xla", f"runs everywhere; there is no kernel for {setting.platform}")
    reason = REFUSALS[kernel](config, setting)
    if reason is not None:
        return Choice("xla", f"not {kernel}: {reason}")
    return Choice(kernel, f"rows of {setting.tokens} tokens on {setting.platform}")


_BRANCHES = "knows no prompts that completions share (data.packing)"


def _spread(setting: Setting) -> str | None:
    return "the tokens of a row lie on one device (mesh.sequence)" if setting.sequence > 1 else None


def _splash(config: ModelConfig, setting: Setting) -> str | None:
    """Returns why the splash kernel cannot compute a model's attention, or None if it can."""
    del config
    if setting.platform != "tpu":
        return f"runs on TPU, not {setting.platform}"
    if setting.branches:
        return _BRANCHES
    if setting.prefix:
        return "has no place for the keys of prefix tuning"
    if setting.tokens % LANES:
        return f"needs rows of a multiple of {LANES} tokens, not {setting.tokens}"
    return _spread(setting)


def _cudnn(config: ModelConfig, setting: Setting) -> str | None:
    """Returns why cuDNN cannot compute a model's attention, or None if it can."""
    if setting.platform != "gpu":
        return f"runs on NVIDIA GPUs, not {setting.platform}"
    if setting.capability is None or setting.capability < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or more"
    if setting.branches:
        return _BRANCHES
    if setting.packed:
        return "knows no segments (data.packing)"
    if setting.prefix:
        return "has no place for the keys of prefix tuning"
    if config.attention_softcap is not None or config.attention_sinks:
        return "has no soft cap and no sinks"
    if config.dtype != "bfloat16":
        return f"computes in bfloat16, not {config.dtype}"
    widest = 256 if setting.capability >= (9, 0) else 128
    if config.head_dim % 8 or config.head_dim > widest:
        return f"needs a head_dim of a multiple of 8 up to {widest}, not {config.head_dim}"
    return _spread(setting)


def _ring(config: ModelConfig, setting: Setting) -> str | None:
    """Returns why ring attention does not apply, or None if it does."""
    del config
    if setting.branches:
        return _BRANCHES
    return None if setting.sequence > 1 else "needs a mesh.sequence of 2 or more"


# back end → what it cannot do; those that are not here compute everything everywhere
REFUSALS: Mapping[str, Callable[[ModelConfig, Setting], str | None]] = MappingProxyType(
    {"splash": _splash, "cudnn": _cudnn, "ring": _ring}
)
