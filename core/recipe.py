"""Recipes: one YAML file of flat keys, each the field of one dataclass, with strict checks and readable errors.

A recipe may be parsed into several dataclasses at once (data, model, trainer ...): their fields share one flat
namespace, so a user never has to know which class a key belongs to.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass, field
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from .errors import AfterglowError, RecipeError

# Names that TRL or transformers retired. A recipe found on the web has them; "did you mean" would guess wrong.
RETIRED = {
    "torch_dtype": "it is called `dtype` now",
    "max_seq_length": "it is called `max_length` now",
    "max_prompt_length": "TRL no longer truncates prompts; filter long prompts with a `length` filter",
    "warmup_ratio": "use `warmup_steps`; a value below 1 is a ratio of all steps",
    "evaluation_strategy": "it is called `eval_strategy` now",
    "tokenizer": "the tokenizer is read from the model's folder",
    "tokenizer_name": "the tokenizer is read from the model's folder",
    "no_cuda": "it is called `use_cpu` now",
    "use_liger_kernel": "TRL's language-model head is always fused; delete the key",
    "use_liger_loss": "TRL's language-model head is always fused; delete the key",
    "dataset_name": "it is called `data` here: a file or a dataset on the hub",
    "dataset_path": "it is called `data` here: a file or a dataset on the hub",
    "dataset_text_field": "trajectories are conversational (`prompt`, `completion`); use `columns`",
    "dataset_mixer": "give `data` a list of files",
    "model_name": "it is called `model_name_or_path` for training, `model` elsewhere",
    "neftune_noise_alpha": "transformers removed it",
    "group_by_length": "use `train_sampling_strategy: group_by_length`",
    "overwrite_output_dir": "pass `--overwrite` on the command line",
}


@dataclass
class Section:
    """A mapping of a recipe with the place of every key, so that each error can name file and line."""

    values: dict[str, Any]
    lines: dict[str, str] = field(default_factory=dict)  # key -> "file:line" or "--key"
    where: str = "recipe"

    def place(self, key: str) -> str:
        """Return `file:line` of a key."""
        return self.lines.get(key, self.where)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML keeps to 1.1: `1e-5` is a number, and `no` (of `save_strategy: no`) a word, not false."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's class attribute
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:bool"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$|^[-+]?\.\d+([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def find_recipe(path: str | Path) -> Path:
    """Return the recipe's path: a file here, else one that comes with the package (`demo/pipeline.yaml`).

    Raises:
        RecipeError: there is no such recipe; names the nearest one.
    """
    here = Path(path)
    if here.is_file():
        return here
    packaged = Path(str(files("afterglow.recipes")))
    name = str(path).removeprefix("recipes/")
    if (packaged / name).is_file():
        return packaged / name
    known = sorted(str(p.relative_to(packaged)) for p in packaged.rglob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    raise RecipeError(f"{path}: no such recipe in {Path.cwd()} or in the package.{hint}")


def packaged_file(path: str) -> str:
    """Return the file that a recipe names: `recipes/unlearning/plain.jinja` is the package's where none is here."""
    if path.startswith("recipes/") and not Path(path).exists():
        packaged = Path(str(files("afterglow.recipes"))) / path.removeprefix("recipes/")
        return str(packaged) if packaged.is_file() else path
    return path


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Section:
    """Read a recipe file and lay command-line overrides (`["--key", "value", ...]`) over it.

    Raises:
        RecipeError: not YAML, a key that stands twice, an unset `${VARIABLE}`, or a malformed override.
    """
    path = find_recipe(path)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}).") from None
    if node is None:
        node = yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values.")
    section = _section(node, path)
    for key, value in _parse_overrides(overrides or []):
        _override(section, key.split("."), value, f"--{key}")
    return section


def _section(node: yaml.MappingNode, path: Path | str) -> Section:
    section = Section({}, {}, str(path))
    for key_node, value_node in node.value:
        key, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if key in section.values:
            raise RecipeError(f"{where}: `{key}` stands twice (first at {section.lines[key]}). Delete one.")
        section.values[key] = _value(value_node, path)
        section.lines[key] = where
    return section


def _value(node: yaml.Node, path: Path | str) -> Any:
    """Build a value; a list of mappings (the steps of a chain) keeps the places of its keys."""
    if isinstance(node, yaml.SequenceNode) and any(_is_step(n) for n in node.value):
        return [_step(n, path) for n in node.value]
    value = _Loader("").construct_document(node)
    return _expand(value, f"{path}:{node.start_mark.line + 1}")


def _is_step(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode) and len(node.value) == 1


def _step(node: yaml.Node, path: Path | str) -> Section:
    """Read a step as a section that holds one section.

    `- name: {key: value}` is the full form, `- name` a step with its defaults, and `- name: word` is short for
    `- name: {name: word}`.
    """
    where = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        return Section({node.value: Section({}, {}, where)}, {node.value: where}, where)
    if not isinstance(node, yaml.MappingNode) or not _is_step(node):
        raise RecipeError(f"{where}: a step is `- name: {{key: value}}`, one name each.")
    name, inner = str(node.value[0][0].value), node.value[0][1]
    if isinstance(inner, yaml.MappingNode):
        keys = _section(inner, path)
        keys.where = where
    elif inner.tag.endswith(":null"):
        keys = Section({}, {}, where)
    elif isinstance(inner, yaml.ScalarNode):
        keys = Section({name: _value(inner, path)}, {name: where}, where)
    else:
        raise RecipeError(f"{where}: the keys of step `{name}` must be a mapping.")
    return Section({name: keys}, {name: where}, where)


def _expand(value: Any, where: str) -> Any:
    """Replace `${NAME}` by the environment variable of that name."""
    if isinstance(value, str):

        def lookup(match: re.Match) -> str:
            if match[1] not in os.environ:
                raise RecipeError(f"{where}: the environment variable {match[1]} is not set. Export it first.")
            return os.environ[match[1]]

        return re.sub(r"\$\{(\w+)\}", lookup, value)
    if isinstance(value, list):
        return [_expand(v, where) for v in value]
    if isinstance(value, dict):
        return {k: _expand(v, where) for k, v in value.items()}
    return value


def _parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """Turn `--key value`, `--key=value` and a bare `--flag` (true) into pairs."""
    pairs, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise RecipeError(f"command line: expected `--key value`, got {word!r}.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        pairs.append((key.replace("-", "_"), _override_value(text, f"--{key}")))
    return pairs


def _override_value(text: str, where: str) -> Any:
    """Read what follows `--key` as a recipe's value; what is not YAML is text."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else _value(node, where)
    except yaml.YAMLError:
        return text
    return text if value is None and text else value


def _override(section: Section, keys: list[str], value: Any, where: str) -> None:
    """Set a (dotted) key; a step of a chain is addressed by its name: `--steps.branching.keep_ratio 0.8`."""
    key, *deeper = keys
    if not deeper:
        section.values[key], section.lines[key] = value, where
        return
    target = section.values.get(key)
    if isinstance(target, list):
        name = deeper.pop(0)
        step = next((s for s in target if isinstance(s, Section) and name in s.values), None)
        if step is None:
            raise RecipeError(f"{where}: `{key}` has no step called `{name}`.")
        if not isinstance(step.values[name], Section):
            step.values[name] = Section({}, {}, step.where)
        target = step.values[name]
    if isinstance(target, Section) and deeper:
        _override(target, deeper, value, where)
    elif isinstance(target, dict) and len(deeper) == 1:
        target[deeper[0]] = value
    else:
        raise RecipeError(f"{where}: `{key}` has no keys below it.")


# ---------------------------------------------------------------------------------------------------------------------
# into dataclasses


def build(section: Section, *classes: type) -> tuple[Any, ...]:
    """Fill dataclasses from one flat section. All errors come in one message.

    Args:
        section: what `read_recipe` returned.
        classes: dataclasses whose init fields are the allowed keys. A key that several of them have goes to each.

    Returns:
        One instance per class, in their order.

    Raises:
        RecipeError: unknown, missing or retired keys, wrong types, or a value that a class refuses.
    """
    fields = {cls: {f.name: f for f in dataclasses.fields(cls) if f.init} for cls in classes}
    known = {name for names in fields.values() for name in names}
    hints = {cls: typing.get_type_hints(cls) for cls in classes}
    errors = [_unknown(section, key, known) for key in section.values if key not in known]
    arguments: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for cls in classes:
        for name, f in fields[cls].items():
            if name in section.values:
                try:
                    value = coerce(section.values[name], hints[cls][name])
                    choices = f.metadata.get("choices")
                    if choices and value is not None and value not in choices:
                        raise ValueError(_none_of(value, choices))
                    arguments[cls][name] = value
                except (TypeError, ValueError) as error:
                    errors.append(f"{section.place(name)}: `{name}`: {error}")
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                errors.append(f"{section.where}: `{name}` is missing. {f.metadata.get('help', '')}".rstrip())
    if errors:
        raise RecipeError("\n".join(dict.fromkeys(errors)))
    return tuple(_construct(cls, arguments[cls], section) for cls in classes)


def defaults_of(*classes: type) -> dict[str, Any]:
    """Return key -> default of dataclasses; keys that must be given have none."""
    found: dict[str, Any] = {}
    for field_ in (f for cls in classes for f in dataclasses.fields(cls) if f.init):
        if field_.default is not dataclasses.MISSING:
            found[field_.name] = field_.default
        elif field_.default_factory is not dataclasses.MISSING:
            found[field_.name] = field_.default_factory()
    return found


def _construct(cls: type, arguments: dict[str, Any], section: Section) -> Any:
    try:
        return cls(**arguments)
    except (AfterglowError, ValueError, TypeError, ImportError) as error:
        named = next((key for key in arguments if re.search(rf"\b{key}\b", str(error))), None)
        raise RecipeError(f"{section.place(named) if named else section.where}: {error}") from error


def _unknown(section: Section, key: str, known: set[str]) -> str:
    if key in RETIRED:
        return f"{section.place(key)}: unknown key `{key}`: {RETIRED[key]}."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"{section.place(key)}: unknown key `{key}`." + (f" Did you mean `{near[0]}`?" if near else "")


def _none_of(value: Any, choices: Any) -> str:
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{value!r} is none of {', '.join(map(str, choices))}{hint}"


def coerce(value: Any, hint: Any) -> Any:
    """Turn a YAML value into the annotated type, without guessing: a word is never a number, 1 is never true.

    Raises:
        ValueError: the value is not of that type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args)
    if origin is typing.Annotated:
        return coerce(value, args[0])
    if origin is Literal:
        if value not in args:
            raise ValueError(_none_of(value, args))
        return value
    if origin in (list, tuple, set) or hint in (list, tuple, set):
        items = value if isinstance(value, list | tuple) else [value]
        inner = args[0] if args else Any
        return (origin or hint)(coerce(item, inner) for item in items)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping, got {value!r}")
        return value
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = [member.value for member in hint]
        if value not in choices and not isinstance(value, hint):
            raise ValueError(_none_of(value, choices))
        return hint(value)
    return _coerce_scalar(value, hint)


def _coerce_union(value: Any, options: tuple) -> Any:
    if value is None and type(None) in options:
        return None
    wanted = [o for o in options if o is not type(None)]
    exact = [o for o in wanted if isinstance(o, type) and type(value) is o]
    for option in exact + wanted:
        try:
            return coerce(value, option)
        except (ValueError, TypeError):
            continue
    names = " or ".join(getattr(o, "__name__", str(o)) for o in wanted)
    raise ValueError(f"expected {names}, got {value!r}")


def _coerce_scalar(value: Any, hint: Any) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint not in (bool, int, float, str, Path):
        return value  # a type of another library: its own class checks it
    raise ValueError(f"expected {hint.__name__}, got {value!r}")


def plain(value: Any) -> Any:
    """Return a recipe value as plain JSON-able data (sections and paths unwrapped)."""
    if isinstance(value, Section):
        return plain(value.values)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, str | int | float | bool | None) else str(value)
