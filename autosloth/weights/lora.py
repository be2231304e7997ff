"""What a LoRA adapter changes in each tensor of the base (LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353).

PEFT itself lays the adapter out, on a base that has shapes and no numbers: ranks, scales, patterns, kinds of
layers and conversions of names are PEFT's. Only the sums stand here, which are done for the rows that are asked for.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..hub_client import model_errors
from ..output import hush_libraries
from .mapping import Cut, other_form, parts_of, tied_weights

# The entries of adapter_config.json that a plain adapter may have, and one that is to be merged. Whatever else is set
# is refused by name: some kinds changed the base when their training began (PiSSA, OLoRA, LoftQ, KaSA), some cannot
# be merged (aLoRA, Arrow), and of those of later versions of PEFT nothing is known.
ABOUT = {"peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
ABOUT |= {"inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "eva_config"}
PLAIN = ABOUT | {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "target_parameters",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "ensure_weight_tying",
}
MERGED = PLAIN | {"exclude_modules", "layers_to_transform", "layers_pattern"}
MERGED |= {"lora_bias", "bias", "trainable_token_indices"}
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # of init_lora_weights: those that leave the base

NAME = "default"  # the adapter's in PEFT's model
WRAPPERS = re.compile(rf"\.(base_layer|original_module|token_adapter|modules_to_save\.{NAME})(?=\.|$)")


def unusual_entries(config: dict[str, Any], usual: Iterable[str]) -> list[str]:
    """The entries of an adapter_config.json that are set though they are not among the usual ones.

    >>> unusual_entries({"r": 16, "use_dora": True, "bias": "none"}, {"r"})
    ['use_dora']
    """
    start = config.get("init_lora_weights")
    known = {
        *usual,
        *(["init_lora_weights"] if start in STARTS else []),
        *(["bias"] if config.get("bias") == "none" else []),
    }
    return [name for name, value in config.items() if value and name not in known]


def described(path: Path) -> dict[str, Any]:
    """PEFT's description of an adapter. Raises ExportError where it cannot be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ExportError(
            f"The adapter's {path} is no JSON that describes one.", "Download it again, or save it again with PEFT."
        )
    return config


@dataclass
class Adapter:
    """What an adapter does to the tensors of a base, by their names in the base's files.

    pairs: A of shape ([experts,] r, columns) and B of shape ([experts,] rows, r), float32; scales: the factor of B A;
    magnitudes: DoRA's length of each row; replaced: tensors that were trained whole; tokens: numbers of the rows that
    were trained whole, and these rows; untied: a tensor that the merged model holds by itself while the base shares
    the one named here.
    """

    pairs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    magnitudes: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, tuple[list[int], Any]] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, base: Path) -> Adapter:
        """The adapter in `folder` for the model in the folder `base`.

        Raises ExportError when it is of a kind that is not merged here, does not fit the base, or holds no numbers.
        """
        hush_libraries()
        config = described(folder / "adapter_config.json")
        other = unusual_entries(config, MERGED)
        if config.get("peft_type") != "LORA" or other:
            raise ExportError(
                f"The adapter in {folder} uses {', '.join(other) or config.get('peft_type')}, which is not merged here.",
                "Train a plain LoRA adapter, or merge this one with PEFT and give the result as the base.",
            )
        model = without_numbers(base, (config.get("auto_mapping") or {}).get("base_model_class"))
        parts = parts_of(model, base)
        tied = tied_weights(model, base, parts)
        adapter = cls(replaced=trained_whole(folder))
        adapter.take(laid_out(model, folder))
        adapter.tokens = {name: rows for name, rows in adapter.tokens.items() if name not in tied}
        if config.get("ensure_weight_tying"):  # what is one weight in the base was trained as one
            adapter.replaced = {name: weight for name, weight in adapter.replaced.items() if name not in tied}
        else:
            adapter.untie(tied)
        stored = {parameter for parameter, _ in parts.values()}
        adapter.repeat({name: shared for name, shared in tied.items() if name in stored and name not in adapter.untied})
        adapter.refuse_strayed()
        return adapter.in_files(parts)

    def take(self, model: Any) -> None:
        """Take over what PEFT's layers do to the parameters of the base within them. Raises ExportError."""
        from peft.tuners.lora import LoraLayer
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                self.take_layer(WRAPPERS.sub("", path), layer)
            elif isinstance(layer, TrainableTokensLayer):
                trained = (
                    layer.tied_adapter or layer
                )  # PEFT ties these rows where a config ties the weights, whatever the files hold
                rows = trained.trainable_tokens_delta[NAME].detach().float()
                self.tokens[WRAPPERS.sub("", path) + ".weight"] = (trained.token_indices[NAME], rows)

    def take_layer(self, path: str, layer: Any) -> None:
        """Take over one layer of LoRA. Raises ExportError for a kind that is not merged here."""
        import torch
        from peft.tuners import lora

        name = f"{path}.{getattr(layer, 'parameter_name', 'weight')}"
        refuse_layer(name, layer)
        self.pairs[name] = tuple(half.detach().float() for half in factors(layer))
        self.scales[name] = layer.scaling[NAME]
        if layer.lora_magnitude_vector:
            self.magnitudes[name] = layer.lora_magnitude_vector[NAME].weight.detach().float()
        if not isinstance(layer, lora.Embedding) and layer.lora_B[NAME].bias is not None:
            bias = layer.lora_B[NAME].bias.detach().float()
            self.pairs[f"{path}.bias"] = (torch.ones(1), bias[:, None])
            self.scales[f"{path}.bias"] = layer.scaling[NAME]

    def untie(self, tied: dict[str, str]) -> None:
        """Find the weights that the base shares with another and training did not.

        PEFT trains one of the two beside the other, but changes both when it merges; what was trained is two weights.
        Rows of tokens it trains for both.
        """
        own = self.pairs.keys() | self.replaced.keys() | self.tokens.keys()
        self.untied = {
            name: shared for name, shared in tied.items() if name in own or shared in own - self.tokens.keys()
        }

    def repeat(self, twins: dict[str, str]) -> None:
        """Do to each weight that the files hold a second time, under the first of these names, what is done to the other."""
        for held in (self.pairs, self.scales, self.magnitudes, self.replaced, self.tokens):
            held |= {name: held[shared] for name, shared in twins.items() if shared in held}

    def refuse_strayed(self) -> None:
        """Raises ExportError when some number of the adapter is not finite."""
        held = {**self.replaced, **self.magnitudes, **{name: rows for name, (_, rows) in self.tokens.items()}}
        held |= {f"{name} ({half})": pair[i] for name, pair in self.pairs.items() for i, half in enumerate("AB")}
        strayed = [name for name, tensor in held.items() if not tensor.sum().isfinite()]
        if strayed:
            raise ExportError(
                f"The adapter's values for {strayed[0]} are not finite: the training went astray.",
                "Train again with a smaller `learning_rate`.",
            )

    def in_files(self, parts: dict[str, tuple[str, Cut | None]]) -> Adapter:
        """The same by the names of the tensors in the base's files. Raises ExportError for one that they hold in another form.

        parts: name in a file -> the parameter that it becomes, and what cuts it out of a parameter's pair if it is only a part.
        """
        named, stored = Adapter(), {parameter for parameter, _ in parts.values()}
        for name, (parameter, cut) in {**parts, **{name: (name, None) for name in self.names - stored}}.items():
            if cut is None:
                for kind in ("pairs", "scales", "magnitudes", "replaced", "tokens"):
                    if parameter in getattr(self, kind):
                        getattr(named, kind)[name] = getattr(self, kind)[parameter]
            elif parameter in self.names:
                if parameter not in self.pairs or parameter in self.replaced:
                    cut = other_form
                named.pairs[name], named.scales[name] = cut(name, self.pairs.get(parameter)), self.scales.get(parameter)
        files = {parameter: name for name, (parameter, _) in parts.items()}
        named.untied = {name: files.get(shared, shared) for name, shared in self.untied.items()}
        return named

    @property
    def names(self) -> set[str]:
        """The tensors that the adapter has something to say about."""
        return self.pairs.keys() | self.replaced.keys() | self.tokens.keys() | self.untied.keys()

    def changes(self, name: str) -> bool:
        """Whether the adapter has something to say about the tensor of this name."""
        return any(name in held for held in (self.pairs, self.replaced, self.tokens, self.untied))

    def is_stack(self, name: str) -> bool:
        """Whether nothing but B A for each of many matrices is added to the tensor of this name, so that each can be merged by itself."""
        alone = not any(name in held for held in (self.replaced, self.tokens, self.untied, self.magnitudes))
        return alone and name in self.pairs and len(self.pairs[name][0].shape) == 3

    def merged_in_stack(self, name: str, weight: Any, matrix: int, rows: Any) -> Any:
        """These rows of one matrix of a stack with the adapter in them, float32; weight: these rows of the base."""
        a, b = (half[matrix] for half in self.pairs[name])
        return weight + self.scales[name] * (b[rows] @ a)

    def merged(self, name: str, weight: Any, rows: slice = slice(None)) -> Any:
        """These rows of the tensor of this name with the adapter in them, float32 where they changed.

        weight: the base's tensor of this name (or of the one that it is untied from), or only these rows of it, which
        are then all that is computed. A row of a stack of experts is the whole matrix of one.
        """
        if name in self.replaced:
            weight = self.replaced[name][rows]
        if name in self.tokens:
            weight = with_tokens(weight.float(), *self.tokens[name], rows.start or 0)
        if name in self.pairs:
            a, b = self.pairs[name]
            change = b[rows] @ (a[rows] if len(a.shape) == 3 else a)
            change *= self.scales[name]
            change += weight
            weight = change
        if name in self.magnitudes:
            weight = (self.magnitudes[name][rows] / weight.norm(dim=1))[:, None] * weight
        return weight

    def refuse_left_over(self, names: set[str]) -> None:
        """Raises ExportError when the adapter changes tensors that are not among these of the base."""
        missing = sorted(self.names - names)
        if missing:
            raise ExportError(
                f"The adapter changes {len(missing)} weights that the base does not have, for example {missing[0]}.",
                "Name the base that it was trained on as `sixteen_bit_model`.",
            )


def refuse_layer(name: str, layer: Any) -> None:
    """Raises ExportError for a layer of PEFT's that is not merged here by rows."""
    from peft.tuners import lora
    from peft.tuners.lora.layer import ParamWrapper

    by_columns = isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False)
    if type(layer) not in (lora.Linear, lora.Embedding, ParamWrapper):
        kind = f"a layer of the kind {type(layer).__name__}"
    elif layer.lora_magnitude_vector and by_columns:
        kind = "DoRA by columns"  # the length of a column is known only when every row is
    elif any(layer.lora_bias.values()) and layer.get_base_layer().bias is None:
        kind = "a bias for a layer that has none"  # nor does PEFT merge it
    else:
        return
    raise ExportError(
        f"The adapter has {kind} ({name}), which is not merged here.", "Train an adapter without it, on linear layers."
    )


def factors(layer: Any) -> tuple[Any, Any]:
    """A and B of one of PEFT's layers, turned so that B A has the shape in which the weight is stored."""
    from peft.tuners import lora

    if isinstance(layer, lora.Embedding):  # a row for each token, where a linear layer would have a column
        return layer.lora_embedding_B[NAME].T, layer.lora_embedding_A[NAME].T
    if hasattr(layer, "parameter_name") and layer.get_param().ndim == 3:
        left, right, _ = layer.get_delta_factors(NAME)
        return right, left
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    return (b.T, a.T) if layer.fan_in_fan_out else (a, b)


def with_tokens(weight: Any, numbers: list[int], values: Any, start: int) -> Any:
    """Rows of an embedding, the first of them number `start`, with those of these numbers replaced."""
    import torch

    places = torch.tensor(numbers) - start
    inside = (places >= 0) & (places < len(weight))
    return weight.index_copy(0, places[inside], values[inside])


def without_numbers(base: Path, trained_as: str | None = None) -> Any:
    """The model in this folder with the shapes of its weights, each in the memory of a single zero. Raises ModelError.

    trained_as: the name of its class in transformers, by default the one that its config names. Not on torch's meta
    device: PEFT moves an adapter to where its base is.
    """
    import torch
    import transformers

    with model_errors(str(base)):
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        names = [name for name in (trained_as, *(config.architectures or [])) if hasattr(transformers, name or "")]
        make = getattr(transformers, names[0]) if names else transformers.AutoModelForCausalLM.from_config
        with torch.device("meta"):  # only now: torch 2.8 cannot import its compiler under it, which transformers does
            model = make(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model


def laid_out(model: Any, folder: Path) -> Any:
    """The model with PEFT's layers in place of its own and the adapter's weights in them. Raises ExportError when they do not fit."""
    from peft import PeftConfig, PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties and of what cannot be merged, both of which are seen to here
            frugal = dict(low_cpu_mem_usage=True, autocast_adapter_dtype=False)
            peft = PeftModel(model, PeftConfig.from_pretrained(folder), **frugal)
            result = peft.load_adapter(folder, NAME, torch_device="cpu", **frugal)
        strange = [*result.unexpected_keys, *result.missing_keys]
    except (RuntimeError, ValueError, KeyError) as error:
        strange = [str(error).strip().split("\n")[-1].strip()]
    if strange:
        raise ExportError(
            f"The adapter in {folder} does not fit the base ({strange[0]}).",
            "Name the base that it was trained on as `sixteen_bit_model`.",
        )
    return peft.base_model.model


def trained_whole(folder: Path) -> dict[str, Any]:
    """The tensors in an adapter's file that take the place of the base's: biases and modules that were trained whole."""
    from peft import load_peft_weights

    weights = load_peft_weights(str(folder), device="cpu")
    return {
        WRAPPERS.sub("", key.removeprefix("base_model.model.")): tensor
        for key, tensor in weights.items()
        if ".lora_" not in key and ".trainable_tokens_" not in key
    }
