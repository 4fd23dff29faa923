"""What a column of a data set holds in place of text: token ids, or the messages of a chat.

Token ids must be tokens of the model that is to read them. Messages become one form, a list of
role and content, out of that and of ShareGPT's from and value.
"""

import json
from typing import Any

import numpy as np

from pipeline.errors import RetraceError

SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of roles


def token_ids(value: Any, where: str, below: int) -> np.ndarray:
    """int32 [n] of a row of a pretokenised column.

    Raises:
        RetraceError: no whole numbers, or one that is no token of the model.
    """
    if value is None:
        return np.empty(0, np.int32)
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        ids = np.empty((), object)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        raise RetraceError(f"{where} is {value!r:.40}, but must be a list of token ids")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < below:
        wrong = next(int(i) for i in ids if not 0 <= i < below)
        raise RetraceError(
            f"{where} holds token {wrong}, but the model's vocabulary is 0 to {below - 1}; give "
            f"text that was tokenised for this model, or the column of text itself"
        )
    return ids.astype(np.int32)


def conversation(value: Any, where: str) -> str:
    """Messages as JSON: a list of role and content; empty where there are none."""
    if value is None or value == []:
        return ""
    messages = []
    for message in value if isinstance(value, list) else [None]:
        keys = message.keys() if isinstance(message, dict) else ()
        # a column of both forms has the keys of both in every row
        role, content = ("from", "value") if keys and message.get("from") else ("role", "content")
        pair = [message.get(role), message.get(content)] if keys else [None, None]
        if not all(isinstance(part, str) for part in pair):
            raise RetraceError(
                f"{where} is {value!r:.60}, but chat: true needs a list of messages, each with "
                f"role and content; name the column by text_field"
            )
        messages.append({"role": SPEAKERS.get(pair[0], pair[0]), "content": pair[1]})
    return json.dumps(messages, ensure_ascii=False)
