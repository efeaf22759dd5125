"""Checkpoints of the mamba_ssm package (state-spaces/mamba-130m, mamba2-130m, ...), read into the transformers classes.

Their config.json speaks of `d_model`, `n_layer` and `ssm_cfg`; the weights have other names, and the vocabulary is
padded. What mamba_ssm fills in where `ssm_cfg` is silent is filled in here too.
"""

from __future__ import annotations

import inspect
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mambalens.hooks.errors import MambalensError

TOKENIZER = "EleutherAI/gpt-neox-20b"
"""What state-spaces' checkpoints were trained with; they do not carry it."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_RENAMED = {r"^backbone\.embedding\.": "backbone.embeddings."}
# ssm_cfg key -> name in transformers, default of mamba_ssm.
_SHARED = {"d_state": ("state_size", None), "d_conv": ("conv_kernel", 4), "expand": ("expand", 2),
           "bias": ("use_bias", False), "conv_bias": ("use_conv_bias", True)}  # fmt: skip
_MAMBA2 = {"headdim": ("head_dim", 64), "ngroups": ("n_groups", 1), "chunk_size": ("chunk_size", 256),
           "dt_limit": ("time_step_limit", (0.0, float("inf")))}  # fmt: skip
_INITIAL = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init", "use_fast_path",
            "use_mem_eff_path", "device", "dtype", "layer_idx"}  # fmt: skip
"""Keys that only say how weights start out or which code runs."""
_FIXED = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None, "activation": "swish",
          "process_group": None, "sequence_parallel": True}  # fmt: skip
"""Keys of which transformers' Mamba-2 has one value only."""


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is mamba_ssm's."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def convert_config(config: dict[str, Any], name: str) -> Any:
    """The configuration in transformers' terms.

    Raises:
        MambalensError: naming what transformers' classes cannot do.
    """
    from transformers import Mamba2Config, MambaConfig

    cfg = dict(config.get("ssm_cfg") or {})
    kind = cfg.pop("layer", "Mamba1")
    if kind not in ("Mamba1", "Mamba2"):
        raise _cannot(name, f"ssm_cfg has layer={kind!r}; 'Mamba1' and 'Mamba2' can be read")
    if config.get("attn_layer_idx"):
        raise _cannot(name, f"layers {config['attn_layer_idx']} are mamba_ssm's own attention, which is not read")
    if config.get("d_intermediate"):
        raise _cannot(name, f"it has MLPs (d_intermediate={config['d_intermediate']}), which are not read")
    if config.get("rms_norm") is False:
        raise _cannot(name, "its norms are LayerNorms (rms_norm=false), where transformers' Mamba has RMSNorms")
    width = int(config["d_model"])
    options: dict[str, Any] = {
        "vocab_size": padded_vocabulary(config),
        "hidden_size": width,
        "num_hidden_layers": int(config["n_layer"]),
        "residual_in_fp32": bool(config.get("residual_in_fp32", True)),
        "tie_word_embeddings": bool(config.get("tie_embeddings", True)),
        "layer_norm_epsilon": float(config.get("norm_epsilon", 1e-5)),
    }
    known = _SHARED | (_MAMBA2 if kind == "Mamba2" else {})
    for key, (theirs, default) in known.items():
        options[theirs] = cfg.pop(key, default)
    options["state_size"] = options["state_size"] or (16 if kind == "Mamba1" else 128)
    inner = int(options["expand"] * width)
    if kind == "Mamba1":
        rank = cfg.pop("dt_rank", "auto")
        options["time_step_rank"] = math.ceil(width / 16) if rank == "auto" else int(rank)
        options["intermediate_size"] = inner
    else:
        if inner % options["head_dim"]:
            raise _cannot(name, f"headdim={options['head_dim']} does not divide its {inner} channels")
        options["num_heads"] = inner // options["head_dim"]
        options["time_step_limit"] = tuple(float(limit) for limit in options["time_step_limit"])
        for key, only in _FIXED.items():
            value = cfg.pop(key, only)
            if value != only:
                raise _cannot(name, f"ssm_cfg has {key}={value!r}, and transformers' Mamba-2 is made for {only!r} only")
    left = sorted(set(cfg) - _INITIAL)
    if left:
        raise _cannot(name, f"ssm_cfg has {', '.join(map(repr, left))}, which is not known here")
    return (MambaConfig if kind == "Mamba1" else Mamba2Config)(**options)


def padded_vocabulary(config: dict[str, Any]) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple."""
    size, multiple = int(config["vocab_size"]), int(config.get("pad_vocab_size_multiple") or 1)
    return math.ceil(size / multiple) * multiple


def load_original(config: dict[str, Any], weights: Path, name: str, **options: Any) -> Any:
    """The model, its weights renamed in memory.

    Args:
        config: its config.json.
        weights: model.safetensors or pytorch_model.bin.
        name: what errors call it.
        options: for `from_pretrained`: dtype, device_map.

    Raises:
        MambalensError: naming a weight that is missing, left over or of another shape.
    """
    from transformers import Mamba2ForCausalLM, MambaForCausalLM

    ours = convert_config(config, name)
    if getattr(ours, "n_groups", 1) > 1 and not _norms_by_group():
        raise _cannot(
            name,
            f"it has {ours.n_groups} groups, and transformers {version('transformers')} norms them as one (Mamba-2's "
            "gated norm): install transformers 5.23 or newer",
        )
    model = MambaForCausalLM if ours.model_type == "mamba" else Mamba2ForCausalLM
    given = {_renamed(key): value for key, value in read_weights(weights).items()}
    if ours.tie_word_embeddings:
        given.setdefault("lm_head.weight", given.get("backbone.embeddings.weight"))
    wanted = _shapes(ours)
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or extra:
        what = [f"{word} {', '.join(keys[:3])}" for word, keys in (("lack", missing), ("also have", extra)) if keys]
        raise _cannot(name, f"its weights {' and '.join(what)}, which its config.json does not speak for")
    wrong = next((key for key, shape in wanted.items() if tuple(given[key].shape) != shape), None)
    if wrong is not None:
        raise _cannot(
            name, f"{wrong} has shape {list(given[wrong].shape)}, its config.json makes it {list(wanted[wrong])}"
        )
    return model.from_pretrained(None, config=ours, state_dict=given, **options)


def read_weights(path: Path) -> dict[str, Any]:
    """Tensors of a checkpoint file; nothing else in it is ever run."""
    import torch
    from safetensors.torch import load_file

    try:
        return (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MambalensError(f"The weights in {str(path)!r} cannot be read ({reason}).") from error


def _norms_by_group() -> bool:
    """Whether transformers' Mamba-2 norms every group of heads on its own, as mamba_ssm does."""
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    return "group_size" in inspect.signature(MambaRMSNormGated).parameters


def _renamed(key: str) -> str:
    for pattern, replacement in _RENAMED.items():
        key = re.sub(pattern, replacement, key)
    return key


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that the model has."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in AutoModelForCausalLM.from_config(config).state_dict().items()}


def _cannot(name: str, why: str) -> MambalensError:
    return MambalensError(f"{name!r} is a mamba_ssm checkpoint that cannot be read: {why}.")
