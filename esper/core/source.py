"""The generated `grown.py`: what grew, as torch code that a person can read."""

from __future__ import annotations

import keyword
import pprint
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from esper.core.folding import LayerPlan
from esper.errors import WrapError
from esper.execution.branches import Branch

_HEADER = '''"""{summary}

Written by Esper {version}; needs torch and `{module}` only.

    import grown
    model = grown.load()
{growth}"""

from __future__ import annotations

import json
{operator}from pathlib import Path

import torch
from torch import Tensor, nn
{functional}
import {module} as origin

ARGUMENTS = {arguments}

'''

_FOOTER = '''
def build() -> nn.Module:
    """The grown model's structure, its weights not yet loaded."""
    model = origin.{attribute}(**ARGUMENTS)
{changes}    return model


def load(path: str | Path | None = None) -> nn.Module:
    """The grown model with its weights, on the CPU, in evaluation mode.

    `path` is the safetensors file, by default the one beside this file.
    """
    model = build()
    model.load_state_dict(read(path or Path(__file__).with_name("model.safetensors")))
    return model.eval()


TYPES = {{
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}}


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; those that are one tensor are stored once."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {{}})
    tensors = {{}}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        raw, dtype = bytearray(data[begin:end]), TYPES[entry["dtype"]]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry["shape"])
    shared = json.loads(metadata.get("shared", "{{}}"))
    return tensors | {{name: tensors[stored] for name, stored in shared.items()}}
'''

_REPLACE = '''
def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Turn the layer called `name` into `new`, wherever it is used; its hooks stay."""
    layer = model.get_submodule(name)
    new.train(layer.training)
    hooks = {key: value for key, value in vars(layer).items() if "_hooks" in key}
    vars(layer).update(vars(new) | hooks)
    layer.__class__ = type(new)

'''

_FEED = '''
class Kept:
    """Carries a layer's input to a later layer of the same forward pass."""

    input: Tensor | None = None

    def take(self) -> Tensor:
        """The input, which is then forgotten."""
        kept, self.input = self.input, None
        assert kept is not None, "the layer that keeps its input has not run"
        return kept

'''


@dataclass(frozen=True)
class Origin:
    """Where the model comes from: the module to import, and what to call in it, with what."""

    module: str
    attribute: str
    arguments: Mapping[str, Any]


def render(
    origin: Origin,
    plans: Mapping[str, LayerPlan],
    fused: Mapping[str, Sequence[str]],
    metadata: Mapping[str, Any],
    version: str,
) -> str:
    """The source of `grown.py`.

    `fused` names, for each kind of container with a fused path, those around a kept seed;
    `metadata["grown"]`, where given, tells of each seed's blueprint, epoch and contribution.

    Raises:
        WrapError: a seed was not built from a blueprint, so there is no source for it.
    """
    stories = {
        (entry["layer"], entry["slot"]): entry
        for entry in metadata.get("grown", ())
        if isinstance(entry, Mapping)
    }
    told = [
        f"  {name}[{slot}]: {_story(stories.get((name, slot)))}; {note}"
        for name, one in plans.items()
        for slot, note in one.notes.items()
    ]
    names = _class_names(plans)
    parts = [_classes(one, names[name], stories) for name, one in plans.items()]
    changes = [_change(one, names[name]) for name, one in plans.items()]
    links = [line for one in plans.values() for line in _links(one, names)]
    for path in fused.get("layers", ()):
        links.append("    # The fused path would read weights and pass over what grew.")
        links.append(f"    model.get_submodule({path!r}).activation_relu_or_gelu = 0")
    links += [
        f"    model.get_submodule({path!r}).use_nested_tensor = False"
        for path in fused.get("encoders", ())
    ]
    body = "".join(
        [
            _FEED if any(one.feeds for one in plans.values()) else "",
            *parts,
            _REPLACE if any(changes) else "",
        ]
    )
    growth = "\nWhat grew:\n" + "\n".join(told) + "\n" if told else ""
    lines = [line for line in [*changes, *links] if line]
    return (
        _HEADER.format(
            summary=_quoted(f"{origin.attribute} of {origin.module}, as it has grown."),
            version=version,
            module=origin.module,
            operator="import operator\n" if "operator." in body else "",
            functional="from torch.nn import functional as F\n" if "F." in body else "",
            growth=_quoted(growth),
            arguments=pprint.pformat(dict(origin.arguments), width=90, sort_dicts=False),
        )
        + body
        + _FOOTER.format(
            attribute=origin.attribute,
            changes="".join(f"{line}\n" for line in lines),
        )
    )


def _story(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "a seed"
    text = f"{entry.get('blueprint') or 'a seed'}"
    if entry.get("epoch") is not None:
        text += f", part of the model since epoch {entry['epoch']}"
    contribution = entry.get("contribution")
    if isinstance(contribution, Mapping):
        text += (
            f", adding {contribution['mean']:.4g} nats a sample"
            f" (at least {contribution['lower']:.4g})"
        )
    return text


def _quoted(text: str) -> str:
    """`text` made safe inside a docstring."""
    return text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')


def _class_names(plans: Mapping[str, LayerPlan]) -> dict[str, str]:
    names: dict[str, str] = {}
    for path in plans:
        words = [word for word in re.split(r"[^0-9A-Za-z]+", path) if word]
        name = "".join(word[0].upper() + word[1:] for word in words) or "Layer"
        name = name if name[0].isalpha() else f"Layer{name}"
        while name in names.values() or keyword.iskeyword(name):
            name += "_"
        names[path] = name
    return names


def _classes(
    one: LayerPlan, name: str, stories: Mapping[tuple[str, int], Mapping[str, Any]]
) -> str:
    seeds = [
        _seed_class(one.name, slot, branch, f"{name}Seed{slot}", stories.get((one.name, slot)))
        for slot, branch in one.kept.items()
    ]
    return "".join(seeds) + (_layer_class(one, name) if one.kept or one.feeds else "")


def _seed_class(
    layer: str, slot: int, branch: Branch, name: str, story: Mapping[str, Any] | None
) -> str:
    module = branch.module
    if not isinstance(module, fx.GraphModule):
        raise WrapError(
            f"{layer}[{slot}]", f"a {type(module).__name__}", "a seed built from a blueprint"
        )
    children = [
        f"        self.{child} = {_constructed(part)}\n" for child, part in module.named_children()
    ]
    children += [
        f"        self.{name} = nn.Parameter(torch.zeros({tuple(own.shape)}, dtype={own.dtype}))\n"
        for name, own in module.named_parameters(recurse=False)
    ]
    code = re.sub(r";  [^\n]*$", "", module.code.strip("\n"), flags=re.MULTILINE)
    code = code[code.index("def forward") :].replace("torch.Tensor", "Tensor")
    code = code.replace("x : Tensor", "x: Tensor")
    code = code.replace("torch.nn.functional.", "F.").replace("torch._C._nn.", "F.")
    indented = "".join(
        f"    {line.rstrip()}\n" if line.strip() else "\n" for line in code.rstrip().splitlines()
    )
    told = _quoted(f"What grew at {layer}, slot {slot}: {_story(story)}.")
    return (
        f'\nclass {name}(nn.Module):\n    """{told}"""\n\n'
        f"    def __init__(self) -> None:\n        super().__init__()\n{''.join(children)}\n"
        f"{indented}\n"
    )


def _layer_class(one: LayerPlan, name: str) -> str:
    base = one.sizes.kind
    made = "".join(f'                "{slot}": {name}Seed{slot}(),\n' for slot in one.kept)
    grown = (
        f"        self.grown = nn.ModuleDict(\n            {{\n{made}            }}\n        )\n"
    )
    read = _narrowed("input", one.axis, one.new_inputs, one.sizes.inputs)
    own = _narrowed("host", one.axis, one.new_outputs, one.sizes.outputs)
    steps = [
        f"        self.kept_{_slug(consumer)}_{slot}.input = input\n"
        for consumer, slot in one.feeds
    ]
    steps.append("        out = host = super().forward(input)\n")
    for slot, branch in one.kept.items():
        sources = {"host": read, "output": own, "producer": f"self.kept_{slot}.take()"}
        seed = f'self.grown["{slot}"]({sources[branch.source]}).type_as(host)'
        if one.new_outputs:
            seed = f"F.pad({seed}, {[0, 0] * (-one.axis - 1) + [0, one.new_outputs]})"
        steps.append(f"        out = out + {seed}\n")
    return (
        f'\nclass {name}(nn.{base}):\n    """{_quoted(one.name)} with what grew beside it."""\n\n'
        f"    def __init__(self) -> None:\n"
        f"        super().__init__({_sizes(one)})\n{grown if one.kept else ''}\n"
        f"    def forward(self, input: Tensor) -> Tensor:\n"
        f'        """As nn.{base}, with the seeds\' outputs added."""\n'
        f"{''.join(steps)}        return out\n\n"
    )


def _narrowed(name: str, axis: int, new: int, size: int) -> str:
    return f"{name}.narrow({axis}, 0, {size})" if new else name


def _change(one: LayerPlan, name: str) -> str:
    """The line of `build` that puts the grown layer in its place, or nothing where none is due."""
    grew_bias = one.bias is not None and one.layer._parameters.get("bias") is None
    if one.kept or one.feeds:
        made = f"{name}()"
    elif one.new_outputs or one.new_inputs or grew_bias or one.tied:
        made = f"nn.{one.sizes.kind}({_sizes(one)})"
    else:
        return ""
    path = "" if one.is_root else one.name
    return f"    replace(model, {path!r}, {made})"


def _links(one: LayerPlan, names: Mapping[str, str]) -> list[str]:
    lines = []
    for consumer, slot in one.feeds:
        lines += [
            "    kept = Kept()",
            f"    model.get_submodule({one.name!r}).kept_{_slug(consumer)}_{slot} = kept",
            f"    model.get_submodule({consumer!r}).kept_{slot} = kept",
        ]
    return lines


def _sizes(one: LayerPlan) -> str:
    """The constructor's arguments of the layer as it is in the end."""
    outputs, inputs = one.sizes.outputs + one.new_outputs, one.sizes.inputs + one.new_inputs
    return _arguments(one.layer, inputs, outputs, one.bias is not None)


def _arguments(layer: nn.Module, inputs: int, outputs: int, bias: bool) -> str:
    match layer:
        case nn.Conv1d() | nn.Conv2d():
            text = f"{inputs}, {outputs}, {_numbers(layer.kernel_size)}"
            once = (1,) * len(layer.kernel_size)
            defaults = {
                "stride": once,
                "padding": (0,) * len(once),
                "dilation": once,
                "groups": 1,
                "padding_mode": "zeros",
            }
        case nn.Embedding():
            text = f"{inputs}, {outputs}"
            defaults = {"padding_idx": None, "scale_grad_by_freq": False, "sparse": False}
            bias = True  # it never has one, and no such argument
        case nn.LayerNorm():
            text, defaults = f"{outputs}", {"eps": 1e-5}
        case nn.BatchNorm2d():
            text = f"{outputs}"
            defaults = {"eps": 1e-5, "momentum": 0.1, "track_running_stats": True}
        case _:
            text, defaults = f"{inputs}, {outputs}", {}
    for name, default in defaults.items():
        if getattr(layer, name) != default:
            text += f", {name}={getattr(layer, name)!r}"
    if not bias:
        text += ", bias=False"
    dtype = layer.get_parameter("weight").dtype
    return text if dtype == torch.float32 else f"{text}, dtype={dtype}"


def _numbers(sizes: tuple[int, ...]) -> str:
    return repr(sizes if len(sizes) > 1 else sizes[0])


def _constructed(module: nn.Module) -> str:
    """A plain torch module as the call that makes it."""
    if isinstance(module, nn.Linear):
        sizes = module.in_features, module.out_features
        return f"nn.Linear({_arguments(module, *sizes, module.bias is not None)})"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        kind = "Conv1d" if isinstance(module, nn.Conv1d) else "Conv2d"
        sizes = module.in_channels, module.out_channels
        return f"nn.{kind}({_arguments(module, *sizes, module.bias is not None)})"
    if isinstance(module, nn.Embedding):
        sizes = module.num_embeddings, module.embedding_dim
        return f"nn.Embedding({_arguments(module, *sizes, True)})"
    if isinstance(module, nn.AvgPool2d):
        return (
            f"nn.AvgPool2d({module.kernel_size}, {module.stride}, {module.padding}, "
            f"{module.ceil_mode}, {module.count_include_pad}, {module.divisor_override})"
        )
    # Dropout and max pooling print as they are called.
    return f"nn.{module!r}"


def _slug(path: str) -> str:
    return re.sub(r"[^0-9A-Za-z]+", "_", path)
