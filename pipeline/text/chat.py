"""Chats -> token ids, by the chat template that a model's tokenizer brings.

The control tokens that the template writes (<|im_start|>) are tokens; the same characters inside of
a message are text, as everywhere in a corpus (`sanitize_control_tokens` of transformers'
`apply_chat_template`). A template is Jinja, which transformers runs in a sandbox. It may write
today's date, as Llama 3.1's does; here it is always the same day.
"""

import datetime
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.errors import RetraceError

DAY = datetime.datetime(2024, 7, 26)  # what Llama 3.1's template writes where no clock is given
CODES = "%a %A %b %B %d %H %j %m %M %S %y %Y".split()


def encoder(
    tokenizer: Any, bos_id: int | None, name: str
) -> Callable[[list[str]], list[np.ndarray]]:
    """Messages as JSON -> int32 token ids of each chat.

    Args:
        bos_id: where blocks begin with BOS, the one that the template writes first is taken off;
            None leaves it.
        name: the text's name, for error messages.

    Raises:
        RetraceError: the tokenizer has no chat template; later, messages that it does not take.
    """
    if not tokenizer.chat_template:
        raise RetraceError(
            f"{name}: corpus.chat: true, but the tokenizer of this model has no chat template; "
            f"take a model that was trained on chats, or a column of text"
        )

    template = dated(tokenizer.get_chat_template())

    def ids_of(chats: list[list[dict]]) -> list[list[int]]:
        return tokenizer.apply_chat_template(
            chats, tokenize=True, return_dict=False, sanitize_control_tokens=True,
            chat_template=template,
        )  # fmt: skip

    def refused(chats: list[list[dict]]) -> RetraceError:
        """The fault of the first chat that the template does not take."""
        for messages in chats:
            try:
                ids_of([messages])
            except Exception as e:
                said = (str(e).splitlines() or [type(e).__name__])[0]
                roles = ", ".join(m["role"] for m in messages)
                return RetraceError(
                    f"{name}: the model's chat template does not take a chat of {roles} ({said}); "
                    f"leave such chats out"
                )
        return RetraceError(f"{name}: the model's chat template does not take these chats together")

    def encode(texts: list[str]) -> list[np.ndarray]:
        chats = [json.loads(text) for text in texts]
        try:
            found = ids_of(chats)
        except Exception as e:  # an error of Jinja, or whatever a template's code raises
            raise refused(chats) from e
        arrays = [np.asarray(ids, np.int32) for ids in found]
        leads = bos_id is not None
        return [ids[int(leads and len(ids) > 0 and ids[0] == bos_id) :] for ids in arrays]

    return encode


def dated(template: str) -> str:
    """The template with a clock that stands still, where it asks for one.

    transformers gives a template a function strftime_now, and lets no caller give another; a macro
    of the same name comes before it.
    """
    if "strftime_now" not in template:
        return template
    fixed = "".join(f" | replace('{code}', '{DAY.strftime(code)}')" for code in CODES)
    return f"{{% macro strftime_now(form) %}}{{{{ form{fixed} }}}}{{% endmacro +%}}{template}"
