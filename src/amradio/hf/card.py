"""The model card of a repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData

from amradio import __version__
from amradio.hf.configuration import AmradioConfig
from amradio.weights.catalog import is_catalog_name, resolve

TASK = "image-feature-extraction"
CARD = "README.md"

_REFERENCES = "refs/"  # full names, such as those of pull requests

_BODY = """
# {title}

An agglomerative vision backbone (RADIO) in the format of [amradio](https://pypi.org/project/amradio/): {parts}.
{origin}
```python
import amradio.hf  # pip install 'amradio[hf]'; registers the classes, no remote code
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
outputs = model(**processor(image, return_tensors="pt"))
outputs.summary   # [1, {summary_dim}], also as outputs.pooler_output
outputs.features  # [1, positions, {embed_dim}]
```

Pictures go in with values in [0, 1], at any size whose sides are multiples of {step} pixels. Everything else that
amradio does takes the same files: `amradio.load(directory)`.
"""


def model_card(config: AmradioConfig, radio: Any, name: str, tags: Sequence[str] = ()) -> ModelCard:
    """Write the card of a model.

    Args:
        config: The model's config.
        radio: The network, a `RadioModel`.
        name: Repository that the example loads from.
        tags: Besides ``amradio``.

    Returns:
        The card. Its licence is that of the published weights that the model came from, if known.
    """
    known = config.identity or {}
    version, terms = known.get("version"), known.get("license")
    entry = resolve(version) if version and is_catalog_name(version) else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys(["amradio", *tags])),
        license="other" if entry else terms and terms.lower(),
        license_name=entry.license.short_name.lower().replace(" ", "-") if entry else None,
        license_link=entry.license.url if entry else None,
    )
    count = sum(p.numel() for p in radio.parameters())
    vit = f"a ViT with {config.num_hidden_layers} blocks, width {config.hidden_size}"
    kind = "E-RADIO" if config.is_hybrid else vit
    parts = [kind, f"{count / 1e6:.1f} million parameters"]
    if radio.adaptors:
        parts.append(f"with the adaptors {', '.join(radio.adaptors)}")
    origin = f"\nIts weights came from `{version}`, whose licence is: {terms or 'unknown'}.\n" if version else ""
    body = _BODY.format(
        title=name.split("/")[-1],
        parts=", ".join(parts),
        origin=origin,
        name=name,
        summary_dim=radio.summary_dim,
        embed_dim=radio.embed_dim,
        step=max(radio.min_resolution_step, radio.model.input_multiple),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a directory to the hub in one commit.

    Args:
        folder: What ``save_pretrained`` wrote.
        repo_id: Name of the repository; it is made if needed.
        commit_message: Default "Upload model".
        commit_description: More of the same.
        private: Whether a new repository is private.
        token: Access token; default the one that is logged in.
        revision: Branch, default the main one; it is made if needed.
        create_pr: Whether to open a pull request instead of committing.

    Returns:
        The commit.
    """
    api = HfApi(token=token, library_name="amradio", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith(_REFERENCES):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    kept = [CARD] if api.file_exists(repo_id, CARD, revision=revision) else []
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=kept,
    )
