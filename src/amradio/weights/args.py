"""The official training arguments ("args") and the model that they describe.

Every checkpoint of NVIDIA's carries the arguments of its training run; they alone say what to build, since even files
with the same version name differ. The rules are those of the official code, except where that contradicts itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from amradio.errors import AmradioError, CheckpointError, ConfigError
from amradio.models.architectures import DINO_STUDENTS, build_vit_config, vit_arguments
from amradio.models.configs import AdaptorConfig, ERadioConfig, HeadConfig, RadioConfig, ViTConfig, from_json
from amradio.models.eradio import ERADIO_VARIANTS

DINO_PREFIX_TOKENS = 5
_TRUNK_ARGS = ("model", "model_kwargs", "cpe_max_size", "register_multiple", "cpe_num_registers", "in_chans")
_ERADIO_IGNORED = ("return_full_features", "pretrained", "num_classes")


def backbone_of(args: Mapping[str, Any]) -> ViTConfig | ERadioConfig:
    """The trunk that training arguments describe.

    Args:
        args: Official training arguments.

    Returns:
        Its config.

    Raises:
        CheckpointError: A needed argument is missing.
        ConfigError: The architecture or one of its settings is unknown, or has a value that makes no sense.
    """
    try:
        return _backbone_of(args)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
        if isinstance(e, AmradioError):
            raise
        shown = {k: args[k] for k in _TRUNK_ARGS if args.get(k) is not None}
        raise ConfigError(
            f"The checkpoint's training arguments describe no network ({type(e).__name__}: {e}). Those of the trunk "
            f"are {str(shown)[:500]}."
        ) from e


def _backbone_of(args: Mapping[str, Any]) -> ViTConfig | ERadioConfig:
    check_arguments(args)
    name = str(_required(args, "model"))
    model_kwargs = dict(args.get("model_kwargs") or {})
    if name in ERADIO_VARIANTS:
        return _eradio(name, model_kwargs, bool(args.get("model_norm")))
    arguments = vit_arguments(name, model_kwargs)
    in_chans = args.get("in_chans") or (args.get("input_size") or [3])[0]
    arguments["global_pool"] = args.get("gp") or arguments["global_pool"]
    if args.get("cpe_max_size") is None:
        return _plain_vit(args, arguments, in_chans)
    return _cpe_vit(args, name, arguments, in_chans)


def _eradio(name: str, model_kwargs: Mapping[str, Any], model_norm: bool) -> ERadioConfig:
    fields = {f.name for f in dataclasses.fields(ERadioConfig)}
    given = {k: v for k, v in model_kwargs.items() if k not in _ERADIO_IGNORED}
    unknown = sorted(set(given) - fields)
    if unknown:
        raise ConfigError(
            f"The checkpoint's model_kwargs for {name!r} have entries that amradio does not understand: {unknown}."
        )
    published = {f: getattr(ERADIO_VARIANTS[name], f) for f in fields} | {"final_norm": model_norm}
    return from_json(ERadioConfig, published | given, f"model_kwargs of {name}")


def _cpe_vit(args: Mapping[str, Any], name: str, arguments: Mapping[str, Any], in_chans: int) -> ViTConfig:
    patch = arguments["patch_size"]
    grid = _cpe_grid(int(args["cpe_max_size"]), patch)
    teachers = list(args.get("teachers") or [])
    names = list(dict.fromkeys(t["name"] for t in teachers))
    per_teacher = args.get("cls_token_per_teacher", True)
    num_cls = max(len(names), 1) if per_teacher else 1
    registers = _num_registers(args, num_cls)
    shared: dict[str, Any] = {"in_chans": in_chans, "position_grid": (grid, grid)}
    if name in DINO_STUDENTS:
        # The official wrapper reads one class token and four registers whatever the arguments say.
        return build_vit_config(
            arguments,
            **shared,
            layer_scale=arguments["init_values"] or 1e-5,
            final_norm=True,
            patch_bias=True,
            num_cls_tokens=1,
            num_registers=num_cls + registers - 1,
        )
    built_for = arguments["img_size"]
    built_for = built_for if isinstance(built_for, int) else built_for[0]
    if not arguments["class_token"]:
        num_cls, registers = 0, 0
    return build_vit_config(
        arguments,
        **shared,
        final_norm=bool(args.get("model_norm", False)),
        position="window" if grid * patch == built_for else "cpe",
        num_cls_tokens=num_cls,
        num_registers=registers,
        pool=_pool(arguments),
        unused_reg_tokens=arguments["reg_tokens"],
    )


def _plain_vit(args: Mapping[str, Any], arguments: Mapping[str, Any], in_chans: int) -> ViTConfig:
    size = arguments["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    patch = arguments["patch_size"]
    num_cls = 1 if arguments["class_token"] else 0
    return build_vit_config(
        arguments,
        in_chans=in_chans,
        final_norm=bool(args.get("model_norm", False)) and arguments["global_pool"] != "avg",
        position="fixed",
        position_grid=(height // patch, width // patch),
        position_of_prefix=not arguments["no_embed_class"] and num_cls + arguments["reg_tokens"] > 0,
        num_cls_tokens=num_cls,
        num_registers=arguments["reg_tokens"],
        pool=_pool(arguments),
        patch_bias=True,
    )


def _pool(arguments: Mapping[str, Any]) -> str:
    pool = arguments["global_pool"]
    if pool not in ("token", "avg"):
        raise ConfigError(f"Pooling {pool!r} is not supported for RADIO models; it must be 'token' or 'avg'.")
    return str(pool)


def _cpe_grid(max_size: int, patch: int) -> int:
    """Side of the position grid in patches (Python rounding, half to even)."""
    grid = round(max_size / patch)
    if grid < 1:
        raise ConfigError(f"cpe_max_size {max_size} leaves no position grid with patches of {patch} pixels.")
    return grid


def check_arguments(args: Any) -> None:
    """Refuse training arguments without the shape that everything else relies on.

    Args:
        args: What a checkpoint has in their place.

    Raises:
        CheckpointError: They are no JSON object, or ``teachers`` is no list of records with a name.
    """
    if not isinstance(args, Mapping):
        raise CheckpointError(f"The checkpoint's training arguments are no record but {str(args)[:200]}.")
    teachers = args.get("teachers") or []
    if not isinstance(teachers, (list, tuple)) or not all(
        isinstance(t, Mapping) and isinstance(t.get("name"), str) for t in teachers
    ):
        raise CheckpointError(
            f"The checkpoint's training arguments have teachers={str(teachers)[:200]}, which must be a list of records "
            f"that each have a 'name'."
        )


def _num_registers(args: Mapping[str, Any], num_cls: int) -> int:
    explicit, multiple = args.get("cpe_num_registers"), args.get("register_multiple")
    if explicit:
        return int(explicit)
    # An exact multiple gets a whole further group of registers.
    return int(multiple) - num_cls % int(multiple) if multiple else 0


def summary_positions(
    args: Mapping[str, Any], backbone: ViTConfig | ERadioConfig, listed: bool = False
) -> tuple[int, ...]:
    """Prefix tokens that make up the backbone summary.

    Class tokens exist for distinct teacher names. The official code numbers them by position in the teacher list
    instead, which differs when a name occurs twice.

    Args:
        args: Official training arguments.
        backbone: Their trunk.
        listed: Number tokens by list position, as the official code does.

    Returns:
        Sorted token positions.
    """
    if not _has_token_per_teacher(args, backbone):
        return (0,)
    positions, names = [], list(dict.fromkeys(t["name"] for t in args.get("teachers") or []))
    seen = set()
    for i, teacher in enumerate(args.get("teachers") or []):
        if teacher.get("use_summary", True) and teacher["name"] not in seen:
            seen.add(teacher["name"])
            positions.append(i if listed else names.index(teacher["name"]))
    return tuple(sorted(positions)) or (0,)


def head_position(args: Mapping[str, Any], backbone: ViTConfig | ERadioConfig, name: str, listed: bool = False) -> int:
    """The prefix token that feeds a teacher's summary head: its ``token_slot``, else its class token.

    Args:
        args: Official training arguments.
        backbone: Their trunk.
        name: Teacher name.
        listed: Default to the list position, as the official code does.

    Returns:
        A token position.
    """
    if not _has_token_per_teacher(args, backbone):
        return 0
    names = [t["name"] for t in args["teachers"]]
    index = names.index(name)
    slot = args["teachers"][index].get("token_slot")
    if slot is not None:
        return int(slot)
    return index if listed else list(dict.fromkeys(names)).index(name)


def with_listed_positions(config: RadioConfig) -> RadioConfig:
    """The same model with tokens numbered by list position, as the official code does.

    Args:
        config: A model read from a layout with training arguments; others are returned as they are.

    Returns:
        The changed config.
    """
    if not config.args.get("teachers"):
        return config
    adaptors = {
        name: dataclasses.replace(a, head_idx=head_position(config.args, config.backbone, name, listed=True))
        for name, a in config.adaptors.items()
    }
    indices = summary_positions(config.args, config.backbone, listed=True)
    return dataclasses.replace(config, adaptors=adaptors, summary_idxs=indices)


def _has_token_per_teacher(args: Mapping[str, Any], backbone: ViTConfig | ERadioConfig) -> bool:
    """Whether summaries come from several class tokens, and not from one shared vector."""
    if isinstance(backbone, ERadioConfig) or backbone.position == "fixed" or str(args["model"]) in DINO_STUDENTS:
        return False
    return bool(args.get("cls_token_per_teacher", True)) and bool(args.get("teachers"))


def head_of(shapes: Mapping[str, Sequence[int]], where: str, upsample_factor: int = 1) -> HeadConfig:
    """The head that a group of tensors makes up; the tensors' names and shapes say all but the upsampling.

    Args:
        shapes: Tensor shapes by name inside the head.
        where: Name of the head in error messages.
        upsample_factor: Of a spatial head.

    Returns:
        Its config.

    Raises:
        CheckpointError: The tensors are those of no known head.
    """
    attention = "mlp.fc1.weight" in shapes
    mlp = "mlp." if attention else ""
    last = f"{mlp}final.2.weight" if f"{mlp}final.2.weight" in shapes else f"{mlp}fc2.weight"
    if f"{mlp}fc1.weight" not in shapes or last not in shapes:
        raise CheckpointError(
            f"{where} has tensors {sorted(shapes)[:8]}, which are those of no known adaptor head (v1, v2 or attn)."
        )
    version = "attn" if attention else "v1" if last.endswith("fc2.weight") else "v2"
    group = "inner" if version == "v1" else "blocks"
    inner = {
        k.split(".")[1] for k in shapes if k.startswith(f"{group}.") and k.endswith(".weight") and len(shapes[k]) == 2
    }
    hidden, width = shapes[f"{mlp}fc1.weight"]
    return HeadConfig(
        version=version,  # type: ignore[arg-type]
        input_dim=width,
        hidden_dim=hidden,
        output_dim=shapes[last][0],
        num_inner=0 if attention else len(inner),
        upsample_factor=upsample_factor,
        pre_norm=f"{mlp}pre_norm.0.weight" in shapes,
    )


def adaptor_of(
    args: Mapping[str, Any],
    backbone: ViTConfig | ERadioConfig,
    name: str,
    shapes: Mapping[str, Sequence[int]],
) -> AdaptorConfig:
    """One teacher's adaptor.

    Args:
        args: Official training arguments.
        backbone: Their trunk.
        name: Teacher name.
        shapes: Shapes of the adaptor's tensors, named ``head_mlp.…`` and ``feat_mlp.…``.

    Returns:
        Its config.

    Raises:
        CheckpointError: Tensors are missing.
    """
    teacher = next(t for t in args["teachers"] if t["name"] == name)
    heads = {
        part: {k.split(".", 1)[1]: s for k, s in shapes.items() if k.startswith(f"{part}.")}
        for part in ("head_mlp", "feat_mlp")
    }
    return AdaptorConfig(
        head_idx=head_position(args, backbone, name),
        summary=head_of(heads["head_mlp"], f"The summary head of adaptor {name!r}"),
        features=head_of(
            heads["feat_mlp"], f"The spatial head of adaptor {name!r}", int(teacher.get("fd_upsample_factor") or 1)
        ),
    )


def _required(args: Mapping[str, Any], name: str) -> Any:
    if name not in args:
        raise CheckpointError(f"The checkpoint's training arguments lack {name!r}; they have {sorted(args)[:20]}.")
    return args[name]


def folded_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments after parametrisations were folded into plain weights, which no longer need unfolding.

    Args:
        args: Official training arguments as a JSON object.

    Returns:
        The same with the three flags off.
    """
    return {**args, "spectral_reparam": False, "spectral_heads": False, "damp": None}
