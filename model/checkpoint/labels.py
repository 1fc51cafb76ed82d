"""What the `model_index.json` of a conditional net says of its labels.

"labels": ["airplane", "car"],  names of the labels 0, 1, ..., if they have names
"null_label": 2,                the label that stands for none, if the net was trained with one
"guidance": 2.0                 classifier-free guidance of pictures with a label, unless a request says otherwise
"""

from model.checkpoint.pipeline import INDEX
from model.nets.lucidrains_config import AnyArchitecture
from model.options import Json, Options
from model.sampling.labels import MOST_GUIDANCE, RANDOM, Labels

OPTIONS = ("labels", "null_label", "guidance")
MAX_NAME = 100  # characters


def read_labels(index: Json, arch: AnyArchitecture) -> Labels | None:
    """The labels of a net, None if it knows none. Raises ModelRefused naming the option that is out of bounds."""
    options = Options(INDEX, index)
    if not arch.labels:
        for option in OPTIONS:
            if index.get(option) is not None:
                raise options.refuse(option, "absent: the net knows no labels")
        return None
    null = options.optional("null_label", 0, arch.labels - 1)
    if null is not None and arch.labels == 1:
        raise options.refuse("null_label", "absent: it is the only label")
    guidance = options.number("guidance", 0.0, MOST_GUIDANCE, 1.0)
    if guidance != 1 and null is None:
        raise options.refuse("guidance", "1 or absent, for there is no null_label")
    return Labels(count=arch.labels, null=null, names=_names(options, arch.labels, null), guidance=guidance)


def _names(options: Options, count: int, null: int | None) -> tuple[str, ...]:
    if options.values.get("labels") is None:
        return ()
    names = options.items("labels", None, count)
    sound = all(isinstance(name, str) and 1 <= len(name) <= MAX_NAME and name.isprintable() for name in names)
    if not sound or len({*names}) < len(names) or RANDOM in names:
        raise options.refuse("labels", f"different texts of 1..{MAX_NAME} printable characters, none of them {RANDOM}")
    if len(names) < count - (null == count - 1):
        raise options.refuse("labels", f"a name for each of {count - (null == count - 1)} labels")
    return tuple(names)
