"""The published models: a table of frozen records, data and not code.

Facts come from the publishers' version table, README tables and model cards. What is not known is None or empty and is
never guessed; what is known only indirectly is said in `CatalogEntry.notes`. Numbers in `CatalogEntry.metrics` are the
publishers' own, measured by their protocols; they are not results of this package.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from amradio.errors import UnknownModelError, nearest_names
from amradio.models.configs import PositionInterpolation, Resolution

DEFAULT_VERSION = "c-radio_v4-h"
"""What an empty version means, here as in the official entry point."""


@dataclass(frozen=True, kw_only=True)
class License:
    """The terms that a model's weights come under.

    Attributes:
        name: Full name.
        short_name: Name for tables.
        url: Where the publishers keep the text.
        commercial: Whether commercial use is allowed. The text itself decides; this is only a pointer to it.
    """

    name: str
    short_name: str
    url: str
    commercial: bool


NSCL_V1 = License(
    name="NVIDIA Source Code License for RADIO (NSCLv1)",
    short_name="NSCLv1",
    url="https://github.com/NVlabs/RADIO/blob/main/LICENSE",
    commercial=False,
)
NVIDIA_OPEN_MODEL = License(
    name="NVIDIA Open Model License Agreement (June 2024)",
    short_name="NVIDIA OML",
    url="https://developer.download.nvidia.com/licenses/nvidia-open-model-license-agreement-june-2024.pdf",
    commercial=True,
)


def _metrics(**values: float) -> Mapping[str, float]:
    return types.MappingProxyType(values)


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """One published model.

    Attributes:
        version: Key, as in the official version table.
        url: The official ``.pth.tar``; None for models that exist on Hugging Face only.
        hf_repo: The Hugging Face repository that holds the model as ``config.json`` and safetensors, if there is one.
        timm_name: The model's name in timm (backbone only), if it has one.
        revision: Full commit of `hf_repo` to pin, where known in full.
        sha256: Digest of the file at `url`, where known.
        license: Terms of the weights.
        architecture: For people.
        teachers: For people, as the publishers list them.
        adaptors: Names that the publishers list; the checkpoint's own list decides.
        patch_size: P, in pixels.
        max_resolution: Largest side in pixels that the publishers recommend.
        preferred_resolution: (height, width) in pixels that suits summaries best.
        supports_vitdet: Whether windowed attention is allowed with these weights.
        vitdet_num_windowed: Windowed blocks between two global ones, where published so.
        vitdet_num_global: Number of global blocks, where published so.
        position_interpolation_published: How the position grid was resized when the weights were trained and evaluated.
        position_interpolation_torch_hub: How the official code resizes it today.
        metrics: Published results, unit in the name.
        metrics_source: Where `metrics` stand.
        params: Exact number of backbone parameters, where known.
        dtype: Parameter dtype of the model after loading, where published.
        notes: What else one should know, uncertainty included.
    """

    version: str
    url: str | None = None
    hf_repo: str | None = None
    timm_name: str | None = None
    revision: str | None = None
    sha256: str | None = None
    license: License
    architecture: str
    teachers: tuple[str, ...] = ()
    adaptors: tuple[str, ...] = ()
    patch_size: int = 16
    max_resolution: int | None = 2048
    preferred_resolution: Resolution | None
    supports_vitdet: bool = True
    vitdet_num_windowed: int | None = None
    vitdet_num_global: int | None = None
    position_interpolation_published: PositionInterpolation
    position_interpolation_torch_hub: PositionInterpolation = "half_pixel"
    metrics: Mapping[str, float] = field(default_factory=_metrics, hash=False)
    metrics_source: str = ""
    params: int | None = None
    dtype: str | None = None
    notes: str = ""

    @property
    def commercial(self) -> bool:
        """Whether the licence allows commercial use."""
        return self.license.commercial


METRIC_NAMES = (
    "throughput_images_per_s",
    "zero_shot_top1_percent",
    "knn_top1_percent",
    "ade20k_miou_percent",
    "voc_miou_percent",
    "gqa_percent",
    "textvqa_percent",
    "vqav2_percent",
    "sam_coco_percent",
)
"""The keys of `CatalogEntry.metrics`, in the order of the publishers' table."""

_HF = "https://huggingface.co/nvidia"
_README = "official README, table of models"
_README_V3 = "official README, tables of the C-RADIOv3 release (zero-shot and k-NN on ImageNet-1k)"
_BEFORE_CHANGE = "Released before the official code changed its position interpolation (28 June 2025)."
_V1_TEACHERS = ("DFN CLIP", "OpenAI CLIP", "DINOv2")
_V2_TEACHERS = (*_V1_TEACHERS, "SAM")
_V25_TEACHERS = ("DFN CLIP", "SigLIP", "DINOv2", "SAM")
_V3_TEACHERS = ("DFN CLIP", "SigLIP2-g", "DINOv2", "SAM")
_V4_TEACHERS = ("SigLIP2-g-384", "DINOv3-7B", "SAM3")
_V2_ADAPTORS = ("clip", "dino_v2", "sam")
_V25_ADAPTORS = ("clip", "siglip", "dino_v2", "sam")
_V3_ADAPTORS = ("clip", "siglip2-g", "dino_v2", "sam")
_V4_ADAPTORS = ("siglip2-g", "dino_v3_7b", "sam3")
_V3_NOTE = (
    "Trained and released with align_corners interpolation of the position grid; the published table appeared after "
    "the official code had changed to half_pixel, so which of the two it was measured with is not certain."
)
_V4_NOTE = (
    "The README calls the adaptors siglip2-g, dino_v3, sam3; the released file says dino_v3_7b. The safetensors on "
    "Hugging Face hold the backbone only; the adaptors are in the .pth.tar."
)

_RADIO = (
    CatalogEntry(
        version="radio_v1",
        url=f"{_HF}/RADIO/resolve/main/radio_v1.pth.tar?download=true",
        license=NSCL_V1,
        architecture="ViT-H/14-CPE",
        teachers=_V1_TEACHERS,
        adaptors=("clip",),
        patch_size=14,
        max_resolution=1050,
        preferred_resolution=Resolution(378, 378),
        position_interpolation_published="align_corners",
        metrics=_metrics(
            throughput_images_per_s=556, zero_shot_top1_percent=82.73, knn_top1_percent=85.29,
            ade20k_miou_percent=50.32,
            voc_miou_percent=85.17, gqa_percent=61.43, textvqa_percent=54.92, vqav2_percent=77.88,
        ),
        metrics_source=_README,
        dtype="float32",
        notes=f"{_BEFORE_CHANGE} The publishers correct their zero-shot figure: 82.73 belongs to another checkpoint, "
        "this one reaches 82.928 on non-square and 82.654 on square 378 px inputs.",
    ),
    CatalogEntry(
        version="radio_v2",
        url=f"{_HF}/RADIO/resolve/main/radio_v2.pth.tar?download=true",
        license=NSCL_V1,
        architecture="ViT-H/16-CPE",
        teachers=_V2_TEACHERS,
        adaptors=_V2_ADAPTORS,
        preferred_resolution=Resolution(432, 432),
        vitdet_num_windowed=5,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            throughput_images_per_s=556, zero_shot_top1_percent=82.71, knn_top1_percent=85.92,
            ade20k_miou_percent=51.33,
            gqa_percent=62.78, textvqa_percent=56.37, vqav2_percent=79.00, sam_coco_percent=76.21,
        ),
        metrics_source=_README,
        dtype="float32",
        notes=f"{_BEFORE_CHANGE} An older results table names RTX-Translate as a fifth teacher and gives lower VQA "
        "scores (GQA 61.50, TextVQA 55.16, VQAv2 78.09). Summaries collapse above about 700 px (mode switch).",
    ),
    CatalogEntry(
        version="radio_v2.1",
        url=f"{_HF}/RADIO/resolve/main/radio_v2.1_bf16.pth.tar?download=true",
        hf_repo="nvidia/RADIO",
        license=NSCL_V1,
        architecture="ViT-H/16-CPE",
        teachers=_V2_TEACHERS,
        adaptors=_V2_ADAPTORS,
        preferred_resolution=Resolution(432, 432),
        vitdet_num_windowed=5,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            throughput_images_per_s=556, zero_shot_top1_percent=82.93, knn_top1_percent=86.06,
            ade20k_miou_percent=51.34,
            voc_miou_percent=84.71, gqa_percent=63.01, textvqa_percent=56.32, vqav2_percent=79.28,
            sam_coco_percent=76.58,
        ),
        metrics_source=_README,
        dtype="bfloat16",
        notes=f"{_BEFORE_CHANGE} Another table of the same README gives SAM-COCO 76.23 and 158 images/s at 432 px. "
        "Summaries collapse above about 700 px (mode switch).",
    ),
    CatalogEntry(
        version="radio_v2.5-b",
        url=f"{_HF}/RADIO/resolve/main/radio-v2.5-b_half.pth.tar?download=true",
        hf_repo="nvidia/RADIO-B",
        license=NSCL_V1,
        architecture="ViT-B/16-CPE",
        teachers=_V25_TEACHERS,
        adaptors=_V25_ADAPTORS,
        preferred_resolution=Resolution(768, 768),
        vitdet_num_global=4,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            zero_shot_top1_percent=74.57, knn_top1_percent=81.89, ade20k_miou_percent=48.94, voc_miou_percent=84.35,
            gqa_percent=63.31, textvqa_percent=56.93, vqav2_percent=79.22, sam_coco_percent=73.87,
        ),
        metrics_source=_README,
        dtype="float32",
        notes=_BEFORE_CHANGE,
    ),
    CatalogEntry(
        version="radio_v2.5-l",
        url=f"{_HF}/RADIO/resolve/main/radio-v2.5-l_half.pth.tar?download=true",
        hf_repo="nvidia/RADIO-L",
        license=NSCL_V1,
        architecture="ViT-L/16-CPE",
        teachers=_V25_TEACHERS,
        adaptors=_V25_ADAPTORS,
        preferred_resolution=Resolution(768, 768),
        vitdet_num_global=4,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            zero_shot_top1_percent=81.01, knn_top1_percent=84.68, ade20k_miou_percent=51.47, voc_miou_percent=85.49,
            gqa_percent=64.13, textvqa_percent=61.93, vqav2_percent=81.02, sam_coco_percent=75.06,
        ),
        metrics_source=_README,
        dtype="float32",
        notes=_BEFORE_CHANGE,
    ),
    CatalogEntry(
        version="radio_v2.5-h",
        url=f"{_HF}/RADIO/resolve/main/radio_v2.5-h.pth.tar?download=true",
        hf_repo="nvidia/RADIO-H",
        license=NSCL_V1,
        architecture="ViT-H/16-CPE",
        teachers=(*_V25_TEACHERS, "Florence2"),
        adaptors=_V25_ADAPTORS,
        preferred_resolution=Resolution(768, 768),
        vitdet_num_global=4,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            throughput_images_per_s=556, zero_shot_top1_percent=82.51, knn_top1_percent=85.81,
            ade20k_miou_percent=51.58,
            voc_miou_percent=85.97, gqa_percent=65.03, textvqa_percent=62.39, vqav2_percent=81.56,
            sam_coco_percent=76.14,
        ),
        metrics_source=_README,
        dtype="float32",
        notes=f"{_BEFORE_CHANGE} Florence2 is named as a teacher by the README's table only.",
    ),
    CatalogEntry(
        version="radio_v2.5-h-norm",
        url=f"{_HF}/RADIO/resolve/main/radio_v2.5-h-norm.pth.tar?download=true",
        license=NSCL_V1,
        architecture="ViT-H/16-CPE, with feature normalizers",
        teachers=_V25_TEACHERS,
        adaptors=_V25_ADAPTORS,
        preferred_resolution=Resolution(768, 768),
        vitdet_num_global=4,
        position_interpolation_published="align_corners",
        notes=f"{_BEFORE_CHANGE} radio_v2.5-h with stored statistics that standardise final and intermediate features; "
        "no results of its own were published.",
    ),
    CatalogEntry(
        version="radio_v2.5-g",
        url=f"{_HF}/RADIO/resolve/main/radio_v2.5-g.pth.tar?download=true",
        hf_repo="nvidia/RADIO-g",
        license=NSCL_V1,
        architecture="DINOv2 ViT-g/14",
        teachers=_V25_TEACHERS,
        adaptors=_V25_ADAPTORS,
        patch_size=14,
        max_resolution=1792,
        preferred_resolution=Resolution(896, 896),
        vitdet_num_global=8,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            zero_shot_top1_percent=83.33, knn_top1_percent=85.34, ade20k_miou_percent=51.94, voc_miou_percent=85.50,
            sam_coco_percent=76.17,
        ),
        metrics_source=_README_V3,
        dtype="float32",
        notes=f"{_BEFORE_CHANGE} The README's other tables give ADE20k 54.56 and VOC 87.37, and call the model "
        "radio-g.",
    ),
    CatalogEntry(
        version="e-radio_v2",
        url=f"{_HF}/RADIO/resolve/main/eradio_v2.pth.tar?download=true",
        hf_repo="nvidia/E-RADIO",
        license=NSCL_V1,
        architecture="E-RADIO (hybrid of convolution and windowed attention)",
        teachers=("Meta CLIP", "DINOv2", "SAM"),
        preferred_resolution=Resolution(512, 512),
        supports_vitdet=False,
        position_interpolation_published="half_pixel",
        dtype="float32",
        notes="No results were published under this name. The README gives those of an earlier 'eradio_v1', which was "
        "never downloadable as such (3697 images/s, zero-shot 77.87, k-NN 83.73, ADE20k 45.50, VOC 79.95, GQA 59.55, "
        "TextVQA 46.31, VQAv2 72.05), and of an 'E-RADIO-L' (468 images/s at 512 px, 391 M parameters, zero-shot "
        "80.73, k-NN 83.89, ADE20k 48.22, VOC 81.64, SAM-COCO 76.31). Inputs must be multiples of 32 px. The model "
        "has no position grid, so the position interpolation has no effect, and the official table allows a "
        "ViTDet window, which only makes the official code refuse more sizes.",
    ),
)  # fmt: skip

_C_RADIO = (
    CatalogEntry(
        version="c-radio",
        hf_repo="nvidia/C-RADIO",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-H/16-CPE",
        teachers=_V25_TEACHERS,
        preferred_resolution=None,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            throughput_images_per_s=556, zero_shot_top1_percent=82.24, knn_top1_percent=85.27,
            ade20k_miou_percent=52.55,
            voc_miou_percent=85.88, gqa_percent=64.01, textvqa_percent=62.12, vqav2_percent=80.74,
            sam_coco_percent=74.82,
        ),
        metrics_source=_README,
        dtype="float32",
        notes=f"{_BEFORE_CHANGE} The first commercial model (December 2024), on Hugging Face only; the README's table "
        "calls it c-radio-h. Its preferred resolution is what its config.json says.",
    ),
    CatalogEntry(
        version="c-radio_v2-b",
        hf_repo="nvidia/C-RADIOv2-B",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-B/16-CPE",
        preferred_resolution=None,
        position_interpolation_published="align_corners",
        notes=f"{_BEFORE_CHANGE} On Hugging Face only. Four teachers; their names are in its config.json.",
    ),
    CatalogEntry(
        version="c-radio_v2-l",
        hf_repo="nvidia/C-RADIOv2-L",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-L/16-CPE",
        preferred_resolution=None,
        position_interpolation_published="align_corners",
        notes=f"{_BEFORE_CHANGE} On Hugging Face only. Four teachers; their names are in its config.json.",
    ),
    CatalogEntry(
        version="c-radio_v2-h",
        hf_repo="nvidia/C-RADIOv2-H",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-H/16-CPE",
        preferred_resolution=None,
        position_interpolation_published="align_corners",
        notes=f"{_BEFORE_CHANGE} On Hugging Face only. Four teachers; their names are in its config.json.",
    ),
    CatalogEntry(
        version="c-radio_v2-g",
        url=f"{_HF}/C-RADIOv2-g/resolve/main/c-radio_v2-g_half.pth.tar",
        hf_repo="nvidia/C-RADIOv2-g",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-g/16-CPE",
        preferred_resolution=Resolution(768, 768),
        vitdet_num_global=8,
        position_interpolation_published="align_corners",
        notes=f"{_BEFORE_CHANGE} Teachers and adaptors are in the checkpoint.",
    ),
    CatalogEntry(
        version="c-radio_v2-vlm-h",
        url=f"{_HF}/C-RADIOv2-VLM-H/resolve/main/c-radio_v2-vlm-h.pth.tar",
        hf_repo="nvidia/C-RADIOv2-VLM-H",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-H/16-CPE",
        preferred_resolution=Resolution(768, 768),
        vitdet_num_global=8,
        position_interpolation_published="align_corners",
        notes=f"{_BEFORE_CHANGE} Meant as the encoder of vision-language models. Teachers and adaptors are in the "
        "checkpoint.",
    ),
    CatalogEntry(
        version="c-radio_v3-b",
        url=f"{_HF}/C-RADIOv3-B/resolve/main/c-radio_v3-b_half.pth.tar?download=true",
        hf_repo="nvidia/C-RADIOv3-B",
        timm_name="vit_base_patch16_radio_v3.c_radio",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-B/16-CPE",
        teachers=_V3_TEACHERS,
        adaptors=_V3_ADAPTORS,
        preferred_resolution=Resolution(512, 512),
        supports_vitdet=False,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            zero_shot_top1_percent=71.30, knn_top1_percent=81.22, ade20k_miou_percent=49.79, voc_miou_percent=84.68,
            sam_coco_percent=74.95,
        ),
        metrics_source=_README_V3,
        params=98_254_854,
        dtype="float32",
        notes=f"{_V3_NOTE} The parameter count includes the 6 values of the input conditioner.",
    ),
    CatalogEntry(
        version="c-radio_v3-l",
        url=f"{_HF}/C-RADIOv3-L/resolve/main/c-radio-v3_l_half.pth.tar?download=true",
        hf_repo="nvidia/C-RADIOv3-L",
        timm_name="vit_large_patch16_radio_v3.c_radio",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-L/16-CPE",
        teachers=_V3_TEACHERS,
        adaptors=_V3_ADAPTORS,
        preferred_resolution=Resolution(512, 512),
        supports_vitdet=False,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            zero_shot_top1_percent=79.95, knn_top1_percent=84.33, ade20k_miou_percent=51.87, voc_miou_percent=86.12,
            sam_coco_percent=75.82,
        ),
        metrics_source=_README_V3,
        params=319_934_470,
        dtype="float32",
        notes=f"{_V3_NOTE} The code in its Hugging Face repository switched to half_pixel in July 2025 with the "
        "weights unchanged. The parameter count includes the 6 values of the input conditioner.",
    ),
    CatalogEntry(
        version="c-radio_v3-h",
        url=f"{_HF}/C-RADIOv3-H/resolve/main/c-radio_v3-h_half.pth.tar?download=true",
        hf_repo="nvidia/C-RADIOv3-H",
        timm_name="vit_huge_patch16_radio_v3.c_radio",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-H/16-CPE",
        teachers=_V3_TEACHERS,
        adaptors=_V3_ADAPTORS,
        preferred_resolution=Resolution(512, 512),
        supports_vitdet=False,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            zero_shot_top1_percent=82.65, knn_top1_percent=86.23, ade20k_miou_percent=52.75, voc_miou_percent=86.41,
            sam_coco_percent=76.56,
        ),
        metrics_source=_README_V3,
        params=651_642_886,
        dtype="float32",
        notes=f"{_V3_NOTE} The parameter count includes the 6 values of the input conditioner.",
    ),
    CatalogEntry(
        version="c-radio_v3-g",
        url=f"{_HF}/C-RADIOv3-g/resolve/main/c-radio_v3-g_half.pth.tar?download=true",
        hf_repo="nvidia/C-RADIOv3-g",
        timm_name="vit_giant_patch16_radio_v3.c_radio",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-g/16-CPE",
        teachers=_V3_TEACHERS,
        adaptors=_V3_ADAPTORS,
        preferred_resolution=Resolution(512, 512),
        supports_vitdet=False,
        position_interpolation_published="align_corners",
        metrics=_metrics(
            zero_shot_top1_percent=83.54, knn_top1_percent=86.59, ade20k_miou_percent=52.68, voc_miou_percent=85.97,
            sam_coco_percent=76.36,
        ),
        metrics_source=_README_V3,
        params=1_159_618_566,
        dtype="float32",
        notes=f"{_V3_NOTE} The code in its Hugging Face repository switched to half_pixel in July 2025 with the "
        "weights unchanged. The parameter count includes the 6 values of the input conditioner.",
    ),
    CatalogEntry(
        version="c-radio_v4-so400m",
        url=f"{_HF}/C-RADIOv4-SO400M/resolve/main/c-radio_v4-so400m_half.pth.tar?download=true",
        hf_repo="nvidia/C-RADIOv4-SO400M",
        timm_name="vit_so400m_patch16_radio_v4.c_radio",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-SO400M/16-CPE",
        teachers=_V4_TEACHERS,
        adaptors=_V4_ADAPTORS,
        preferred_resolution=Resolution(512, 512),
        position_interpolation_published="half_pixel",
        params=431_237_232,
        dtype="float32",
        notes=_V4_NOTE,
    ),
    CatalogEntry(
        version="c-radio_v4-h",
        url=f"{_HF}/C-RADIOv4-H/resolve/main/c-radio_v4-h_half.pth.tar?download=true",
        hf_repo="nvidia/C-RADIOv4-H",
        timm_name="vit_huge_patch16_radio_v4.c_radio",
        license=NVIDIA_OPEN_MODEL,
        architecture="ViT-H/16-CPE",
        teachers=_V4_TEACHERS,
        adaptors=_V4_ADAPTORS,
        preferred_resolution=Resolution(512, 512),
        position_interpolation_published="half_pixel",
        params=651_645_440,
        dtype="float32",
        notes=_V4_NOTE,
    ),
)  # fmt: skip

_ENTRIES = (*_RADIO, *_C_RADIO)

_NEVER_KEYS: Mapping[str, tuple[str, str]] = types.MappingProxyType(
    {
        "eradio_v1": ("is printed in the official README, but no checkpoint was ever published under it", "e-radio_v2"),
        "e-radio_v1": ("is how the first E-RADIO is cited, but no checkpoint was published under it", "e-radio_v2"),
        "eradio_v2": ("is the name of the E-RADIO file, not of the model", "e-radio_v2"),
        "eradio": ("is the name of the E-RADIO architecture, not of a published model", "e-radio_v2"),
        "e-radio": ("is the name of the model family, not of a published model", "e-radio_v2"),
        "e-radio-l": ("is printed in the official README's results, but was never a version key", "e-radio_v2"),
        "radio-g": ("is what the official README calls the ViT-g/14, but was never a version key", "radio_v2.5-g"),
        "c-radio-h": ("is what the official README calls the first C-RADIO, but was never a version key", "c-radio"),
    }
)
"""Names that people find in print and that never were keys: why, and what to use instead."""


def entries() -> tuple[CatalogEntry, ...]:
    """All published models: RADIO and E-RADIO by generation, then C-RADIO.

    Returns:
        The records of the catalog.
    """
    return _ENTRIES


@cache
def _by_name() -> Mapping[str, CatalogEntry]:
    by_repo = {e.hf_repo.lower(): e for e in _ENTRIES if e.hf_repo is not None}
    return types.MappingProxyType(by_repo | {e.version: e for e in _ENTRIES})


def is_catalog_name(name: str) -> bool:
    """Whether `resolve` knows a name.

    Args:
        name: A version key or a Hugging Face repository id, in any case.

    Returns:
        True if a published model has this name.
    """
    return name.lower() in _by_name()


def resolve(name: str = "") -> CatalogEntry:
    """Look a published model up.

    Args:
        name: A version key such as ``radio_v2.5-l``, or the Hugging Face id of the same model, such as
            ``nvidia/RADIO-L``; case does not matter. Empty means `DEFAULT_VERSION`.

    Returns:
        The model's record.

    Raises:
        UnknownModelError: No published model has this name; the message names the nearest.
    """
    wanted = name.lower() or DEFAULT_VERSION
    entry = _by_name().get(wanted)
    if entry is not None:
        return entry
    if wanted in _NEVER_KEYS:
        why, instead = _NEVER_KEYS[wanted]
        raise UnknownModelError(f"{name!r} {why}. The nearest published model is {instead!r}.")
    raise UnknownModelError(
        f"{name!r} is not a published model. {nearest_names(name, (e.version for e in _ENTRIES))} "
        "'amradio models' lists them all; the path of a file or directory, or a Hugging Face id, is accepted too."
    )
