import dataclasses
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amradio.errors import UnknownModelError
from amradio.weights.catalog import (
    DEFAULT_VERSION,
    METRIC_NAMES,
    NSCL_V1,
    NVIDIA_OPEN_MODEL,
    entries,
    is_catalog_name,
    resolve,
)

HF = "https://huggingface.co/nvidia/"

# The official version table, written down a second time: (URL, P, max, preferred, ViTDet, num_windowed, num_global).
VERSION_TABLE = {
    "radio_v2.5-b": ("RADIO/resolve/main/radio-v2.5-b_half.pth.tar?download=true", 16, 2048, 768, True, None, 4),
    "radio_v2.5-l": ("RADIO/resolve/main/radio-v2.5-l_half.pth.tar?download=true", 16, 2048, 768, True, None, 4),
    "radio_v2.5-h": ("RADIO/resolve/main/radio_v2.5-h.pth.tar?download=true", 16, 2048, 768, True, None, 4),
    "radio_v2.5-h-norm": ("RADIO/resolve/main/radio_v2.5-h-norm.pth.tar?download=true", 16, 2048, 768, True, None, 4),
    "radio_v2.5-g": ("RADIO/resolve/main/radio_v2.5-g.pth.tar?download=true", 14, 1792, 896, True, None, 8),
    "radio_v2.1": ("RADIO/resolve/main/radio_v2.1_bf16.pth.tar?download=true", 16, 2048, 432, True, 5, None),
    "radio_v2": ("RADIO/resolve/main/radio_v2.pth.tar?download=true", 16, 2048, 432, True, 5, None),
    "radio_v1": ("RADIO/resolve/main/radio_v1.pth.tar?download=true", 14, 1050, 378, True, None, None),
    # The official table says that E-RADIO allows windows; its code then installs none.
    "e-radio_v2": ("RADIO/resolve/main/eradio_v2.pth.tar?download=true", 16, 2048, 512, False, None, None),
    "c-radio_v2-g": ("C-RADIOv2-g/resolve/main/c-radio_v2-g_half.pth.tar", 16, 2048, 768, True, None, 8),
    "c-radio_v2-vlm-h": ("C-RADIOv2-VLM-H/resolve/main/c-radio_v2-vlm-h.pth.tar", 16, 2048, 768, True, None, 8),
    "c-radio_v3-b": (
        "C-RADIOv3-B/resolve/main/c-radio_v3-b_half.pth.tar?download=true", 16, 2048, 512, False, None, None,
    ),
    "c-radio_v3-l": (
        "C-RADIOv3-L/resolve/main/c-radio-v3_l_half.pth.tar?download=true", 16, 2048, 512, False, None, None,
    ),
    "c-radio_v3-h": (
        "C-RADIOv3-H/resolve/main/c-radio_v3-h_half.pth.tar?download=true", 16, 2048, 512, False, None, None,
    ),
    "c-radio_v3-g": (
        "C-RADIOv3-g/resolve/main/c-radio_v3-g_half.pth.tar?download=true", 16, 2048, 512, False, None, None,
    ),
    "c-radio_v4-so400m": (
        "C-RADIOv4-SO400M/resolve/main/c-radio_v4-so400m_half.pth.tar?download=true", 16, 2048, 512, True, None, None,
    ),
    "c-radio_v4-h": (
        "C-RADIOv4-H/resolve/main/c-radio_v4-h_half.pth.tar?download=true", 16, 2048, 512, True, None, None,
    ),
}  # fmt: skip
HUGGING_FACE_ONLY = {
    "c-radio": "nvidia/C-RADIO",
    "c-radio_v2-b": "nvidia/C-RADIOv2-B",
    "c-radio_v2-l": "nvidia/C-RADIOv2-L",
    "c-radio_v2-h": "nvidia/C-RADIOv2-H",
}
# (throughput, zero-shot, k-NN, ADE20k, VOC, GQA, TextVQA, VQAv2, SAM-COCO), as published
PUBLISHED = {
    "radio_v2.1": (556, 82.93, 86.06, 51.34, 84.71, 63.01, 56.32, 79.28, 76.58),
    "radio_v2": (556, 82.71, 85.92, 51.33, None, 62.78, 56.37, 79.00, 76.21),
    "radio_v1": (556, 82.73, 85.29, 50.32, 85.17, 61.43, 54.92, 77.88, None),
    "radio_v2.5-b": (None, 74.57, 81.89, 48.94, 84.35, 63.31, 56.93, 79.22, 73.87),
    "radio_v2.5-l": (None, 81.01, 84.68, 51.47, 85.49, 64.13, 61.93, 81.02, 75.06),
    "radio_v2.5-h": (556, 82.51, 85.81, 51.58, 85.97, 65.03, 62.39, 81.56, 76.14),
    "radio_v2.5-g": (None, 83.33, 85.34, 51.94, 85.50, None, None, None, 76.17),
    "c-radio": (556, 82.24, 85.27, 52.55, 85.88, 64.01, 62.12, 80.74, 74.82),
    "c-radio_v3-b": (None, 71.30, 81.22, 49.79, 84.68, None, None, None, 74.95),
    "c-radio_v3-l": (None, 79.95, 84.33, 51.87, 86.12, None, None, None, 75.82),
    "c-radio_v3-h": (None, 82.65, 86.23, 52.75, 86.41, None, None, None, 76.56),
    "c-radio_v3-g": (None, 83.54, 86.59, 52.68, 85.97, None, None, None, 76.36),
}
PARAMS = {
    "c-radio_v3-b": 98_254_854,
    "c-radio_v3-l": 319_934_470,
    "c-radio_v3-h": 651_642_886,
    "c-radio_v3-g": 1_159_618_566,
    "c-radio_v4-so400m": 431_237_232,
    "c-radio_v4-h": 651_645_440,
}


def test_holds_exactly_the_published_versions():
    versions = [e.version for e in entries()]
    assert len(versions) == len(set(versions))
    assert set(versions) == set(VERSION_TABLE) | set(HUGGING_FACE_ONLY)


@pytest.mark.parametrize("version", VERSION_TABLE)
def test_agrees_with_the_version_table(version):
    url, patch_size, max_resolution, preferred, vitdet, num_windowed, num_global = VERSION_TABLE[version]
    entry = resolve(version)
    assert entry.url == HF + url
    assert entry.patch_size == patch_size
    assert entry.max_resolution == max_resolution
    assert entry.preferred_resolution == (preferred, preferred)
    assert entry.supports_vitdet is vitdet
    assert (entry.vitdet_num_windowed, entry.vitdet_num_global) == (num_windowed, num_global)
    assert entry.position_interpolation_torch_hub == "half_pixel"


@pytest.mark.parametrize(("version", "repo"), HUGGING_FACE_ONLY.items())
def test_models_on_hugging_face_only_have_no_url(version, repo):
    assert resolve(version).url is None
    assert resolve(version).hf_repo == repo


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.version)
def test_every_entry_is_consistent(entry):
    assert entry.license is (NVIDIA_OPEN_MODEL if entry.version.startswith("c-radio") else NSCL_V1)
    assert entry.commercial is entry.version.startswith("c-radio")
    assert entry.url is not None or entry.hf_repo is not None
    assert set(entry.metrics) <= set(METRIC_NAMES)
    assert bool(entry.metrics) == bool(entry.metrics_source)
    assert all(0 < v <= 100 for k, v in entry.metrics.items() if k.endswith("_percent"))
    assert entry.params == PARAMS.get(entry.version)
    assert entry.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert entry.revision is None or re.fullmatch(r"[0-9a-f]{40}", entry.revision)
    if entry.preferred_resolution is not None:
        assert all(side % entry.patch_size == 0 for side in entry.preferred_resolution)


@pytest.mark.parametrize("version", [e.version for e in entries()])
def test_metrics_are_the_published_ones(version):
    values = zip(METRIC_NAMES, PUBLISHED.get(version, ()), strict=False)
    assert dict(resolve(version).metrics) == {k: v for k, v in values if v is not None}


def test_position_interpolation_as_published():
    half_pixel = {e.version for e in entries() if e.position_interpolation_published == "half_pixel"}
    assert half_pixel == {"c-radio_v4-h", "c-radio_v4-so400m", "e-radio_v2"}  # E-RADIO has no position grid


def test_records_cannot_be_changed():
    entry = resolve("radio_v2.1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.patch_size = 14
    with pytest.raises(TypeError):
        entry.metrics["voc_miou_percent"] = 100.0
    assert len({*entries(), *entries()}) == len(entries())  # hashable


def test_empty_name_is_the_default():
    assert resolve() == resolve("") == resolve(DEFAULT_VERSION)
    assert resolve().version == "c-radio_v4-h"


@given(st.sampled_from(entries()), st.randoms(use_true_random=False))
def test_names_and_repositories_resolve_in_any_case(entry, random):
    for name in (entry.version, entry.hf_repo):
        if name is not None:
            mixed = "".join(random.choice((c.upper(), c.lower())) for c in name)
            assert resolve(mixed) is entry
            assert is_catalog_name(mixed)


def test_repository_of_the_readme_is_v2_1():
    assert resolve("nvidia/RADIO").version == "radio_v2.1"
    assert resolve("nvidia/c-radiov4-h").version == "c-radio_v4-h"
    assert resolve("nvidia/C-RADIO").version == "c-radio"


def test_unknown_name_lists_the_nearest():
    assert not is_catalog_name("radio_v25-l")
    with pytest.raises(UnknownModelError) as e:
        resolve("radio_v25-l")
    assert str(e.value) == (
        "'radio_v25-l' is not a published model. Nearest names: radio_v2.5-l, radio_v2.5-h, radio_v2.5-g. "
        "'amradio models' lists them all; the path of a file or directory, or a Hugging Face id, is accepted too."
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("eradio_v1", "e-radio_v2"),
        ("E-RADIO_v1", "e-radio_v2"),
        ("eradio_v2", "e-radio_v2"),
        ("e-radio-l", "e-radio_v2"),
        ("radio-g", "radio_v2.5-g"),
        ("c-radio-h", "c-radio"),
    ],
)
def test_printed_names_that_never_were_keys_are_explained(name, nearest):
    assert not is_catalog_name(name)
    with pytest.raises(UnknownModelError, match=re.escape(f"The nearest published model is '{nearest}'.")) as e:
        resolve(name)
    assert str(e.value).startswith(f"{name!r} is ")
    assert is_catalog_name(nearest)


def test_eradio_v1_message_word_for_word():
    with pytest.raises(UnknownModelError) as e:
        resolve("eradio_v1")
    assert str(e.value) == (
        "'eradio_v1' is printed in the official README, but no checkpoint was ever published under it. "
        "The nearest published model is 'e-radio_v2'."
    )


def test_needs_neither_torch_nor_the_hub():
    code = (
        "import sys; import amradio.weights.catalog, amradio.weights.download; "
        "print([m for m in ('torch', 'huggingface_hub', 'numpy', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
