"""How a command line names a policy together with its settings."""

from vase_vllm.errors import EvictionError


def parse_policy_label(label: str) -> tuple[str, dict[str, str]]:
    """The policy's name and its settings.

    >>> parse_policy_label("vase:sampling=greedy,smoothing=1")
    ('vase', {'sampling': 'greedy', 'smoothing': '1'})

    Raises:
        EvictionError: the label is not NAME or NAME:KEY=VALUE,...
    """
    name, _, options = label.partition(":")
    settings = {}
    for option in filter(None, options.split(",")):
        key, separator, value = option.partition("=")
        if not (key and separator and value):
            raise EvictionError(f"policy {label!r}: write NAME or NAME:KEY=VALUE,KEY=VALUE")
        settings[key] = value
    return name, settings
