"""What the `model_index.json` of a conditional net says of its labels.

"id2label": {"0": "cat", "1": "dog"}   names of labels, or several between commas, as diffusers' DiTPipeline has them
"null_label": 2                        the label that stands for none, if the net was trained with one
"guidance": 2.0                        classifier-free guidance of pictures with a label, unless a request says more
"""

from model.checkpoint.pipeline import INDEX
from model.nets.lucidrains_config import AnyArchitecture
from model.options import Json, Options
from model.sampling.labels import MOST_GUIDANCE, RANDOM, Labels

OPTIONS = ("id2label", "null_label", "guidance")
MAX_NAME = 100  # characters


def read_labels(index: Json, arch: AnyArchitecture) -> Labels | None:
    """The labels of a net, None if it knows none. Raises ModelRefused naming the option that is out of bounds."""
    options = Options(INDEX, index)
    if not arch.labels:
        for option in OPTIONS:
            if index.get(option) is not None:
                raise options.refuse(option, "absent: the net knows no labels")
        return None
    null = options.optional("null_label", 0, arch.labels - 1, arch.null_label)
    if null is not None and arch.labels == 1:
        raise options.refuse("null_label", "absent: it is the only label")
    guidance = options.number("guidance", 0.0, MOST_GUIDANCE, 1.0)
    if guidance != 1 and null is None:
        raise options.refuse("guidance", "1 or absent, for there is no null_label")
    return Labels(count=arch.labels, null=null, names=_names(options, arch.labels), guidance=guidance)


def _names(options: Options, count: int) -> dict[int, str]:
    """Names by label."""
    given = options.values.get("id2label")
    if given is None:
        return {}
    if not isinstance(given, dict) or not {*given} <= {*map(str, range(count))}:
        raise options.refuse("id2label", f"an object of names by label, from 0 to {count - 1}")
    sound = all(isinstance(name, str) and 1 <= len(name) <= MAX_NAME and name.isprintable() for name in given.values())
    if not sound or RANDOM in given.values():
        words = f"of names, each of 1..{MAX_NAME} printable characters, none of them {RANDOM}"
        raise options.refuse("id2label", words)
    return {int(label): name for label, name in given.items()}
