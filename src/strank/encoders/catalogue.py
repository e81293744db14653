"""The encoders by name, and facts of the image networks: where from, on what terms.

An entry here is all that a new one needs. Facts are those of the models' cards, as
`lazyslide-models` registers them; a test compares. Nothing is imported for them, so that listing
them is cheap.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from strank.encoders.base import Encoder, Field
from strank.errors import InputError

_Colour = tuple[float, float, float]
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
_HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_SWIGLU = {"mlp_layer": "swiglu", "act_layer": "silu"}


@dataclass(frozen=True)
class EncoderEntry:
    """An image network with published weights."""

    name: str  # In `obsm`, too
    repo: str  # On the Hugging Face hub
    citation: str
    n_features: int
    architecture: Mapping[str, Any]  # What builds it without weights, as in `Backbone`
    file: str = "pytorch_model.bin"
    licence: str = "CC-BY-NC-ND-4.0"
    gated: bool = True  # Given after its terms were accepted on the hub
    library: str = "timm"
    um_per_pixel: float = 0.5  # Of the patches it expects
    pixels: int = 224
    colours: tuple[_Colour, _Colour] = _IMAGENET  # Mean and standard deviation, of 0 to 1
    # What the network gives by itself, mostly its class token; or "class+mean", which appends the
    # mean of the patch tokens.
    pooling: str = "own"
    precision: str = "fp16"  # That its authors compute in on a GPU: a name of `PRECISIONS`
    rest: tuple[str, ...] = ()  # How names of weights begin that the file has besides
    revision: str | None = None  # If nobody pinned one the newest is taken, and recorded

    @property
    def mean(self) -> list[float]:
        """Of red, green and blue."""
        return list(self.colours[0])

    @property
    def std(self) -> list[float]:
        """Of red, green and blue."""
        return list(self.colours[1])

    @property
    def field(self) -> Field:
        """The window it looks at."""
        return Field(self.um_per_pixel * self.pixels, self.pixels)

    @property
    def terms(self) -> str:
        """What a user must know before the weights can be had."""
        gate = f", gated: ask at https://huggingface.co/{self.repo}" if self.gated else ""
        return f"licence {self.licence}{gate}"


def _timm(architecture: str, **model_args: Any) -> dict[str, Any]:
    model_args = {"num_classes": 0, **model_args}
    return {"architecture": architecture, "model_args": model_args, "pretrained_cfg": {}}


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
_CAPTIONS = tuple(f"visual.{name}" for name in ("proj_contrast", "attn_pool_caption", "ln_caption"))
_OPTIMUS = _timm("vit_giant_patch14_reg4_dinov2", img_size=224)
_ENTRIES = (
    EncoderEntry(
        "resnet50",
        "timm/resnet50.tv_in1k",
        "He et al. 2016, doi:10.1109/CVPR.2016.90",
        2048,
        _timm("resnet50"),
        file="model.safetensors",
        licence="BSD-3-Clause",
        gated=False,
        rest=("fc.",),
    ),
    # The card names no scale; 112 µm is what HEST's benchmark shows it, enlarged to its input.
    EncoderEntry(
        "conch",
        "MahmoodLab/conch",
        "Lu et al. 2024, doi:10.1038/s41591-024-02856-4",
        512,
        _timm("conch"),
        um_per_pixel=0.25,
        pixels=448,
        colours=_CLIP,
        precision="float32",
        rest=("text.", "text_decoder.", "logit_scale", *_CAPTIONS),
    ),
    # Of 512 pixels at 0.5 µm, as TITAN was trained.
    EncoderEntry(
        "conch_v1.5",
        "MahmoodLab/conchv1_5",
        "Ding et al. 2024, doi:10.48550/arXiv.2411.19666",
        768,
        _timm("conch_v1.5"),
        file="pytorch_model_vision.bin",
        um_per_pixel=256 / 448,
        pixels=448,
    ),
    EncoderEntry(
        "uni",
        "MahmoodLab/UNI",
        "Chen et al. 2024, doi:10.1038/s41591-024-02857-3",
        1024,
        _timm("vit_large_patch16_224", init_values=1e-5),
    ),
    EncoderEntry(
        "uni2-h",
        "MahmoodLab/UNI2-h",
        "Chen et al. 2024, doi:10.1038/s41591-024-02857-3",
        1536,
        _timm(
            "vit_giant_patch14_224",
            depth=24,
            num_heads=24,
            embed_dim=1536,
            mlp_ratio=2.66667 * 2,
            init_values=1e-5,
            reg_tokens=8,
            no_embed_class=True,
            **_SWIGLU,
        ),
        precision="bf16",
    ),
    EncoderEntry(
        "virchow2",
        "paige-ai/Virchow2",
        "Zimmermann et al. 2024, doi:10.48550/arXiv.2408.00738",
        2560,
        _timm(
            "vit_huge_patch14_224",
            mlp_ratio=5.3375,
            init_values=1e-5,
            reg_tokens=4,
            global_pool="",
            **_SWIGLU,
        ),
        pooling="class+mean",
    ),
    EncoderEntry(
        "h-optimus-0",
        "bioptimus/H-optimus-0",
        "Saillard et al. 2024, https://github.com/bioptimus/releases",
        1536,
        _OPTIMUS,
        licence="Apache 2.0",
        gated=False,
        colours=_BIOPTIMUS,
    ),
    EncoderEntry(
        "h-optimus-1",
        "bioptimus/H-optimus-1",
        "Bioptimus 2025, https://huggingface.co/bioptimus/H-optimus-1",
        1536,
        _OPTIMUS,
        colours=_BIOPTIMUS,
    ),
    EncoderEntry(
        "h0-mini",
        "bioptimus/H0-mini",
        "Filiot et al. 2025, doi:10.48550/arXiv.2501.16239",
        768,
        _timm("vit_base_patch14_reg4_dinov2", img_size=224, mlp_ratio=5.33334, **_SWIGLU),
        colours=_BIOPTIMUS,
    ),
    EncoderEntry(
        "gigapath",
        "prov-gigapath/prov-gigapath",
        "Xu et al. 2024, doi:10.1038/s41586-024-07441-w",
        1536,
        _timm("vit_giant_patch14_dinov2", img_size=224, patch_size=16, mlp_ratio=5.33334),
        licence="Apache 2.0 with conditions",
    ),
    EncoderEntry(
        "phikon-v2",
        "owkin/phikon-v2",
        "Filiot et al. 2024, doi:10.48550/arXiv.2409.09173",
        1024,
        {"model_type": "dinov2", "image_size": 224, "patch_size": 16, **_LARGE},
        file="model.safetensors",
        licence="Owkin non-commercial license",
        gated=False,
        library="transformers",
        precision="float32",
    ),
    EncoderEntry(
        "hibou-l",
        "histai/hibou-L",
        "Nechaev et al. 2024, doi:10.48550/arXiv.2406.05074",
        1024,
        {"model_type": "dinov2_with_registers", "image_size": 224, "patch_size": 14}
        | {"use_swiglu_ffn": True, **_LARGE},
        file="model.safetensors",
        licence="Apache 2.0",
        library="transformers",
        colours=_HIBOU,
        precision="float32",
    ),
    EncoderEntry(
        "midnight",
        "kaiko-ai/midnight",
        "Karasikov et al. 2025, doi:10.48550/arXiv.2504.05186",
        3072,
        {"model_type": "dinov2", "image_size": 518, "patch_size": 14}
        | {"use_swiglu_ffn": True, **_GIANT},
        file="model.safetensors",
        licence="MIT",
        library="transformers",
        colours=_HALVES,
        pooling="class+mean",
    ),
    # Its authors give the weights on Google Drive only; this is a copy of them.
    EncoderEntry(
        "ctranspath",
        "jamesdolezal/CTransPath",
        "Wang et al. 2022, doi:10.1016/j.media.2022.102559",
        768,
        _timm("ctranspath"),
        file="ctranspath.pth",
        licence="GPL-3.0",
        gated=False,
        um_per_pixel=1.0,
        precision="float32",
    ),
)

CATALOGUE: dict[str, EncoderEntry] = {entry.name: entry for entry in _ENTRIES}

# Encoders that need no weights, by what makes them: the place to add one.
ENCODERS: dict[str, str] = {"morphology": "strank.encoders.morphology.encoder:Morphology"}

# What builds an image network, by how its name begins.
LIBRARIES = {"timm": "timm", "hf": "transformers"}

_PROTOCOL = ("name", "version", "fields", "feature_names", "encode")


def get_encoder(
    name: str, *, um: float | None = None, weights: Path | str | None = None, own: bool = True
) -> Encoder:
    """Make the encoder of that name, on the CPU.

    Nothing but tensors is read of weights, and no code of a hub is run: architectures come from the
    installed libraries.

    Parameters
    ----------
    name
        ``morphology``, which needs no weights; a network of the catalogue, such as ``uni`` (see
        `encoder_table`); any other of the hub as ``timm:resnet18``, ``timm:owner/name`` or
        ``hf:owner/name`` (transformers); ``timm:folder`` or ``hf:folder`` for a local folder in the
        hub's layout (``config.json``, ``model.safetensors`` and, of transformers,
        ``preprocessor_config.json``); or ``module:callable``, what gives an `Encoder` when it is
        called.
    um
        Side of the window around a spot, in µm, for an image network; its pixels are those of the
        network. If ``None``, what the catalogue says, or 112 µm.
    weights
        File with the weights of a network of the catalogue, in place of those on the hub:
        safetensors, or a checkpoint of torch that holds nothing but tensors.
    own
        Whether ``module:callable`` is imported: not where the name comes out of a file, such as a
        model that was downloaded, which could name any code.

    Returns
    -------
    Encoder
        ``strank.embed`` moves an image network to the GPU.

    Raises
    ------
    InputError
        For an unknown name, with the choices; if it cannot be loaded: no network, a damaged folder,
        weights that are not safetensors or incomplete or of another network, a hub that cannot be
        reached, or does not give them; or if what ``module:callable`` gives is no encoder.

    Examples
    --------
    >>> get_encoder("morphology").fields[0]
    Field(um=100.0, pixels=224)
    >>> get_encoder("morphologie")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: no encoder 'morphologie'; did you mean 'morphology'? choose one of ...
    """
    if name in CATALOGUE or name.partition(":")[0] in LIBRARIES:
        # Here, so that listing names needs no torch.
        from strank.encoders.load import load_encoder

        return load_encoder(name, um=um, weights=weights)
    for option, given in {"weights": weights, "um": um}.items():
        if given is not None:
            raise InputError(f"`{option}` is for image networks, which {name!r} is not")
    if ":" in name:
        if not own:
            raise InputError(
                f"{name}: code that a file names is not run; if you trust it, give `encoder={name}`"
            )
        return _made_by(name)
    if name not in ENCODERS:
        choices = [*ENCODERS, *CATALOGUE]
        near = difflib.get_close_matches(name.lower(), choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"no encoder {name!r}; {hint}choose one of {', '.join(choices)}, timm:NAME, hf:NAME, "
            "module:callable"
        )
    module, _, attribute = ENCODERS[name].partition(":")
    encoder: Encoder = getattr(import_module(module), attribute)()
    return encoder


def _made_by(name: str) -> Encoder:
    module, _, attribute = name.partition(":")
    try:
        make: Callable[[], Encoder] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        # Not what the module itself lacks.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"{name}: no module {module!r}; install it, or put its folder into PYTHONPATH"
        ) from error
    except (AttributeError, ValueError) as error:
        raise InputError(
            f"{name}: no {attribute!r} in {module!r}; write module:callable"
        ) from error
    if not callable(make):
        raise InputError(f"{name}: cannot be called; it must give an encoder when it is")
    encoder = make()
    absent = [part for part in _PROTOCOL if not hasattr(encoder, part)]
    if absent:
        raise InputError(
            f"{name}: gives no encoder: {type(encoder).__name__} has no {', '.join(absent)}; see "
            "strank.encoders.Encoder"
        )
    return encoder


def encoder_table() -> list[dict[str, Any]]:
    """List the encoders that have a name: what each gives, looks at, and may be used for.

    Returns
    -------
    list[dict]
        For each ``name``, ``width`` (number of features), ``um_per_pixel`` and ``pixels`` of its
        window, ``mean`` and ``std`` of the colours (``None`` for those without weights),
        ``precision`` that its authors compute in, ``licence``, ``gated`` (whether the licence is to
        be accepted on the hub), ``source``, ``file``, ``revision`` and ``citation``.

    Examples
    --------
    >>> [(row["name"], row["width"]) for row in encoder_table() if row["name"] == "uni2-h"]
    [('uni2-h', 1536)]
    """
    rows: list[dict[str, Any]] = []
    for name in ENCODERS:
        encoder = get_encoder(name)
        window = encoder.fields[0]
        row: dict[str, Any] = {"name": name, "width": len(encoder.feature_names)}
        row |= {"um_per_pixel": window.um / window.pixels, "pixels": window.pixels}
        row |= {"mean": None, "std": None, "precision": "float32", "licence": "BSD-3-Clause"}
        row |= {"gated": False, "source": "built in", "file": None, "revision": encoder.version}
        rows.append(row | {"citation": "strank"})
    called = {"width": "n_features", "source": "repo"}
    for entry in CATALOGUE.values():
        rows.append({name: getattr(entry, called.get(name, name)) for name in rows[0]})
    return rows
