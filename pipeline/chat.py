"""Chats -> token ids, by the chat template that a model's tokenizer brings.

The template makes one text of the messages, whose control tokens (<|im_start|>) are tokens, not
text, as in transformers' `apply_chat_template`. It is Jinja, which transformers runs in a sandbox.
A template may write today's date, as Llama 3.1's does; here it is always the same day.
"""

import datetime
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.errors import RetraceError

DAY = datetime.date(2024, 7, 26)  # what Llama 3.1's template writes where no clock is given


def encoder(
    tokenizer: Any, bos_id: int | None, name: str
) -> Callable[[list[str]], list[np.ndarray]]:
    """Messages as JSON -> int32 token ids of each chat.

    Args:
        bos_id: where blocks begin with BOS, the one that the template writes first is taken off;
            None leaves it.
        name: of the text, for faults.

    Raises:
        RetraceError: the tokenizer has no chat template; later, messages that it does not take.
    """
    if not tokenizer.chat_template:
        raise RetraceError(
            f"{name}: corpus.chat: true, but the tokenizer of this model has no chat template; "
            f"take a model that was trained on chats, or a column of text"
        )
    backend = tokenizer.backend_tokenizer

    def rendered(chat: str) -> str:
        messages = json.loads(chat)
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, strftime_now=DAY.strftime
            )
        except Exception as e:  # of Jinja, or whatever a template's code meets
            said = (str(e).splitlines() or [type(e).__name__])[0]
            roles = ", ".join(m["role"] for m in messages)
            raise RetraceError(
                f"{name}: the model's chat template does not take a chat of {roles} ({said}); "
                f"leave such chats out"
            ) from e

    def encode(chats: list[str]) -> list[np.ndarray]:
        backend.encode_special_tokens = False
        found = backend.encode_batch_fast([rendered(c) for c in chats], add_special_tokens=False)
        arrays = [np.asarray(e.ids, np.int32) for e in found]
        leads = bos_id is not None
        return [ids[int(leads and len(ids) > 0 and ids[0] == bos_id) :] for ids in arrays]

    return encode
