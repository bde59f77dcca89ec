"""Right choices of the items of lm-eval's tasks: whether each item has one, and how many are right by guessing."""

from collections.abc import Mapping
from typing import Any

from sbeval.errors import InputError


def is_standard(task: Any) -> bool:
    """Return whether a task's accuracy is the share of items whose likeliest choice is right."""
    return task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results)


def right(task: Any, item: Mapping[str, Any]) -> list[int]:
    """Return the indices of an item's right choices, as lm-eval finds them; empty where it has none."""
    choices = task.doc_to_choice(item)
    try:
        given = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    # an answer that names no choice
    except (KeyError, ValueError, IndexError, TypeError):
        return []
    found = [choices.index(one) if one in choices else one for one in (given if isinstance(given, list) else [given])]
    return [one for one in found if isinstance(one, int)] if all(one in range(len(choices)) for one in found) else []


def check(name: str, task: Any) -> None:
    """Raise InputError for an item of a standard task with a choice that is no text, or without its answer: lm-eval
    would take -1 for the last choice."""
    if not is_standard(task):
        return
    for number, item in enumerate(task.eval_docs, 1):
        if not all(isinstance(choice, str) for choice in task.doc_to_choice(item)):
            raise InputError(f"item {number} of task {name!r} has a choice that is no text, and cannot be scored")
        if not right(task, item):
            raise InputError(f"item {number} of task {name!r} has no answer among its choices, and cannot be scored")


def chance(task: Any) -> float | None:
    """Return the accuracy of guessing; None where it is not a share of right choices."""
    if not is_standard(task):
        return None
    items = {instance.doc_id: instance.doc for instance in task.instances}
    return sum(len(right(task, item)) / len(task.doc_to_choice(item)) for item in items.values()) / len(items)
