"""What a file may say of an image network: plain values, by an allow-list.

timm and transformers take arguments that open files, call the hub or run its code. None of them
is handed on from a file, whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from strank.doors import checked, shown_key
from strank.errors import InputError
from strank.extras import need

# Networks of transformers that take pixels alone, give the same at every call, and build as fast as
# their layers are few.
_MODEL_TYPES = {"beit", "bit", "clip_vision_model", "convnext", "convnextv2", "data2vec-vision"}
_MODEL_TYPES |= {"deit", "dinov2", "dinov2_with_registers", "dinov3_convnext", "dinov3_vit"}
_MODEL_TYPES |= {"efficientnet", "focalnet", "hiera", "mobilenet_v1", "mobilenet_v2", "mobilevit"}
_MODEL_TYPES |= {"mobilevitv2", "regnet", "resnet", "siglip_vision_model", "swin", "swinv2"}
_MODEL_TYPES |= {"vit", "vit_msn"}

# Fields of a config of transformers that name code or another place: without them it would be
# another network than its authors meant. The values are those that do neither.
_CODE = re.compile(r"auto_map|attn_implementation$|backbone|quantization|kernel|adapter|custom_")
_HARMLESS: tuple[Any, ...] = (None, False, "eager", "sdpa", [], {})

_LARGEST, _WIDEST, _MOST_LAYERS, _MOST_STAGES = 2**20, 2048, 512, 64

# The largest number a field of a config of transformers may have, by what its name says: sides of
# images, what multiplies, what is repeated (in all), the rest.
_MOST = {"image_size": _WIDEST, "coefficient|multiplier|divisor|divisible": 16}
_MOST |= {"layers|depth|blocks|repeats": _MOST_LAYERS, "": _LARGEST}


class Strict(BaseModel):
    """What has these fields only, of these types, without conversion."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]*$", max_length=64)]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=256)]
Colour = Annotated[list[float], Field(min_length=3, max_length=3)]
_Positive = Annotated[float, Field(gt=0, le=1e6)]
_Size = Annotated[int, Field(ge=0, le=_LARGEST)]
_Side = Annotated[int, Field(ge=1, le=_WIDEST)]
_Layers = Annotated[int, Field(ge=0, le=_MOST_LAYERS)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Number = Annotated[float, Field(ge=-1e6, le=1e6)]
_Sides = _Side | Annotated[list[_Side], Field(max_length=2)]


def _few_layers(value: Any) -> Any:
    if isinstance(value, list) and sum(x for x in value if isinstance(x, int)) > _MOST_LAYERS:
        raise ValueError(f"at most {_MOST_LAYERS} layers in all")
    return value


_Stages = Annotated[
    list[_Layers] | _Layers, Field(max_length=_MOST_STAGES), BeforeValidator(_few_layers)
]
_Widths = Annotated[list[_Size], Field(max_length=_MOST_STAGES)] | _Size


class _TimmArguments(Strict):
    """Arguments of networks of timm that are plain values and open nothing."""

    num_classes: _Size = 0
    in_chans: Literal[3] = 3
    img_size: _Sides = 224
    patch_size: _Sides = 16
    window_size: _Sides = 7
    embed_dim: _Widths = 0
    dims: _Widths = 0
    num_features: _Size = 0
    depth: _Layers = 0
    depths: _Stages = 0
    num_heads: _Widths = 1
    mlp_ratio: _Positive = 4.0
    init_values: _Number = 0.0
    ls_init_value: _Number = 0.0
    reg_tokens: _Size = 0
    output_stride: _Size = 32
    drop_rate: _Share = 0.0
    drop_path_rate: _Share = 0.0
    proj_drop_rate: _Share = 0.0
    attn_drop_rate: _Share = 0.0
    pos_drop_rate: _Share = 0.0
    patch_drop_rate: _Share = 0.0
    qkv_bias: bool = True
    qk_norm: bool = False
    class_token: bool = True
    no_embed_class: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    strict_img_size: bool = True
    scale_mlp_norm: bool = False
    scale_attn_norm: bool = False
    use_abs_pos_emb: bool = True
    use_rot_pos_emb: bool = False
    global_pool: Word = ""
    pos_embed: Word = ""
    weight_init: Word = ""
    act_layer: Word = ""
    norm_layer: Word = ""
    mlp_layer: Literal["swiglu"] = "swiglu"


class _TimmFacts(Strict):
    """What timm's description of pretrained weights says of the architecture and its input."""

    num_classes: _Size = 0
    label_offset: _Size = 0
    input_size: Annotated[list[_Side], Field(min_length=3, max_length=3)] = [3, 224, 224]
    fixed_input_size: bool = False
    pool_size: Annotated[list[_Size], Field(max_length=2)] | None = None
    first_conv: Word | list[Word] | None = None
    classifier: Word | list[Word] | None = None
    mean: Colour = [0.5] * 3
    std: Colour = [0.5] * 3


TIMM_FACTS = frozenset(_TimmFacts.model_fields)


class _Timm(Strict):
    architecture: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)]
    model_args: dict[str, Any]
    pretrained_cfg: _TimmFacts


class _Network(Strict):
    """A backbone's config."""

    library: Literal["timm", "transformers"]
    name: Name
    architecture: dict[str, Any]
    mean: Colour
    std: Annotated[list[_Positive], Field(min_length=3, max_length=3)]
    pixels: _Side
    um: _Positive
    pooling: Literal["own", "class+mean"] = "own"
    revision: Word | None = None


def check_network(config: Mapping[str, Any]) -> None:
    """Refuse what a file may not say of an image network; the error names the field.

    >>> facts = {"library": "timm", "name": "x", "mean": [0.5] * 3, "std": [0.5] * 3, "um": 112.0}
    >>> args = {"checkpoint_path": "/etc/passwd"}
    >>> network = {"architecture": "resnet18", "model_args": args, "pretrained_cfg": {}}
    >>> check_network({**facts, "pixels": 224, "architecture": network})
    Traceback (most recent call last):
    ...
    strank.errors.InputError: x: architecture.model_args.checkpoint_path: not to be given by a file
    """
    where = str(config.get("name"))[:256]
    checked(_Network, config, where)
    if config["library"] == "timm":
        timm_arguments(config["architecture"], where, "architecture.")
    else:
        transformers_arguments(config["architecture"], where, "architecture.")


def timm_arguments(architecture: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """Check the name, arguments and facts of a network of timm; give the arguments that are set."""
    checked(_Timm, architecture, where, prefix)
    name = architecture["architecture"]
    # An argument that is None is one that is not given.
    given = {key: value for key, value in architecture["model_args"].items() if value is not None}
    checked(_TimmArguments, given, where, f"{prefix}model_args.")
    if not _can_be_built(name):
        raise InputError(
            f"{where}: {prefix}architecture: {name!r} cannot be built by the timm that is "
            "installed; install another version of timm"
        )
    return given


def _can_be_built(architecture: str) -> bool:
    from strank.encoders.architectures import TOWERS

    if architecture in TOWERS:
        return True
    need("timm")
    from timm import is_model

    return bool(is_model(architecture))


def transformers_arguments(stored: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """Give those fields of a config of transformers that are its architecture's own, checked."""
    kind = stored.get("model_type") if isinstance(stored, dict) else None
    if kind not in _MODEL_TYPES:
        raise InputError(
            f"{where}: {prefix}model_type: {str(kind)[:40]!r} cannot be built: not one of "
            f"{', '.join(sorted(_MODEL_TYPES))}"
        )
    need("transformers")
    from transformers import AutoConfig
    from transformers.configuration_utils import PretrainedConfig

    try:
        usual = AutoConfig.for_model(kind).to_dict()
    except ValueError as error:
        raise InputError(
            f"{where}: {kind} cannot be built by the transformers that is installed; install "
            "another version of transformers"
        ) from error
    # Those that every config has say nothing of the network; others are of no use here.
    own = usual.keys() - PretrainedConfig().to_dict().keys() - {"num_labels"}
    for name in sorted(stored.keys() - own):
        if _CODE.search(name) and stored[name] not in _HARMLESS:
            raise InputError(f"{where}: {prefix}{shown_key(name)}: not to be given by a file")
    found = {name: stored[name] for name in sorted(own & stored.keys())}
    for name, value in found.items():
        if problem := _problem(name, value):
            raise InputError(f"{where}: {prefix}{name}: {problem}")
    if found.get("num_channels", 3) != 3:
        raise InputError(f"{where}: {prefix}num_channels: must be 3")
    return {"model_type": kind, **found}


def _problem(name: str, value: Any) -> str | None:
    """Say what keeps a value from being plain and of a size that can be."""
    items = list(_flat(value))
    most = next(most for pattern, most in _MOST.items() if re.search(pattern, name))
    numbers = [x for x in items if isinstance(x, int | float) and not isinstance(x, bool)]
    words = [x for x in items if isinstance(x, str)]
    if len(numbers) + len(words) + sum(isinstance(x, bool | None) for x in items) < len(items):
        return "not a plain value"
    # NaN is not below.
    if not all(abs(number) <= most for number in numbers):
        return f"must be a number up to {most}"
    if most == _MOST_LAYERS and sum(numbers) > most:
        return f"at most {most} layers in all"
    if not all(re.fullmatch(r"[A-Za-z0-9_+-]{0,64}", word) for word in words):
        return "not a plain word"
    return "a list that is too long" if len(items) > _MOST_LAYERS else None


def _flat(value: Any) -> Iterator[Any]:
    """Members of lists in lists; what lies deeper stays a list, which is no plain value."""
    for item in value if isinstance(value, list) else [value]:
        yield from item if isinstance(item, list) else [item]


class _Prepared(BaseModel):
    """What a preprocessor's config says of a patch; the rest is how others cut and resize it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    image_mean: Colour
    image_std: Annotated[list[_Positive], Field(min_length=3, max_length=3)]
    size: _Side | dict[str, _Side]
    crop_size: _Side | dict[str, _Side] | None = None
    do_normalize: bool = True
    do_center_crop: bool | None = None


def prepared(stored: Any, where: str) -> dict[str, Any]:
    """Read mean and std of the colours, and the side of a patch, from a preprocessor's config."""
    facts = checked(_Prepared, stored, where)
    crops = facts.crop_size is not None and facts.do_center_crop is not False
    side = facts.crop_size if crops else facts.size
    if isinstance(side, dict):
        side = side.get("height") or side.get("shortest_edge")
    if side is None:
        raise InputError(f"{where}: size: says neither height nor shortest_edge")
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3}
    colours = {"mean": facts.image_mean, "std": facts.image_std}
    return {**(colours if facts.do_normalize else plain), "pixels": side}
