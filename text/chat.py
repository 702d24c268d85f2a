"""Conversations for fine-tuning: chat templates, which make tokens of messages, and the task instruct."""

import json
import re
import secrets

import numpy as np
import torch.nn.functional as F

from config import UserError
from foreign import shown, telling
from ops import IGNORE
from text.examples import Examples, Row, read_columns
from text.tokenizer import with_secret_specials

ROLES = ("system", "user", "assistant")
GENERATION = r"\{%[-+]?\s*generation\s*[-+]?%\}"
# For models without a template; BEGIN and END are the tokens that begin and end a text.
PLAIN_TEMPLATE = """\
{{ 'BEGIN' }}{% for message in messages %}{{ message.role | capitalize + ':\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message.content | trim + 'END' }}{% endgeneration %}{% else %}{{ message.content | trim }}{% endif %}
{{- '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""


def plain_template(begin, end):
    """A template of plain text for a tokenizer's tokens: a line with the role before each message."""
    return PLAIN_TEMPLATE.replace("BEGIN", begin).replace("END", end)


class Chat:
    """A chat template and the tokenizer that reads what it renders, as transformers' apply_chat_template does.

    But the name of a special token in a message is ordinary text: only the template gives such tokens.
    """

    def __init__(self, template, names, saved):
        """names: {a template's variable, such as eos_token: the token}; saved: the tokenizer.json, a dict."""
        self.template, self._names = template, names
        self.ends = set()  # ids of the tokens that have ended answers
        self._key = secrets.token_hex(8)
        self._begin, self._end = f"{self._key}<", f"{self._key}>"  # of a part between a template's generation marks
        with telling(lambda reason: f"the chat template cannot be used ({reason}); see --chat_template"):
            import tokenizers

            self._render = environment(self._begin, self._end).from_string(template).render
        harmless, self._secret = with_secret_specials(saved)
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(harmless))
        special = [token for token in saved.get("added_tokens") or [] if token["content"] in self._secret]
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        self._tokenizer.add_special_tokens([
            tokenizers.AddedToken(self._secret[token["content"]], **{flag: token.get(flag, False) for flag in flags})
            for token in special
        ])  # fmt: skip
        self._special_ids = [token["id"] for token in special]
        longest_first = sorted(self._secret, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "$^")

    def ids(self, messages, where):
        """(ids, mask of those that are answers) of a conversation, arrays. where: names it in errors.

        An answer is an assistant's turn, from behind what a template gives with add_generation_prompt to the last
        special token, which ends it; or what stands between a template's generation marks. A token on the border of an
        answer belongs to it. UserError where the template shows no answers or ends one with no special token.
        """
        ids, answers, borders = self._encoded(self._parts(messages, where))
        for here in borders:
            special = here[np.isin(ids[here], self._special_ids)]
            if not len(special):
                rule = f"{where}: the chat template ends an assistant's turn with no special token, so none could end"
                raise UserError(f"{rule}; let it write {{{{ eos_token }}}} there, in a --chat_template=FILE")
            if not re.search(GENERATION, self.template):
                here = here[here <= special[-1]]
            answers[here] = True
            self.ends.add(int(ids[special[-1]]))
        return ids, answers

    def prompt(self, messages, where):
        """The ids after which the assistant's answer to the messages comes, an array."""
        text = self._rendered(messages, where, add_generation_prompt=True)
        return self._encoded([(re.sub(f"{self._begin}|{self._end}", "", text), False)])[0]

    def _parts(self, messages, where):
        """[(text, whether it is an answer)] of a rendered conversation."""
        whole, parts, done = self._rendered(messages, where), [], 0
        if re.search(GENERATION, self.template):
            return [(part, i % 2 == 1) for i, part in enumerate(re.split(f"{self._begin}|{self._end}", whole))]
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            before = self._rendered(messages[:i], where, add_generation_prompt=True)
            after = self._rendered(messages[: i + 1], where)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                rule = (
                    f"{where}: the chat template changes earlier messages for later ones, so turn {i + 1} has no place"
                )
                raise UserError(f"{rule}; mark answers in it by {{% generation %}}, in a --chat_template=FILE")
            parts += [(whole[done : len(before)], False), (after[len(before) :], True)]
            done = len(after)
        return [*parts, (whole[done:], False)]

    def _rendered(self, messages, where, **options):
        """The template's text, in which the names of special tokens in messages are hidden."""
        hidden = [{key: value if key == "role" or value is None else self._special.sub(self._hide, value)
                   for key, value in message.items()} for message in messages]  # fmt: skip
        with telling(lambda reason: f"{where} does not fit the chat template ({reason}); mend the record"):
            return self._render(messages=hidden, tools=None, documents=None, **self._names, **options)

    def _hide(self, match):
        return f"{self._key}{[*self._secret].index(match[0])}{self._key}"

    def _encoded(self, parts):
        """(ids, zeros, [places of an answer's tokens]) of _parts."""
        text, borders, names = "", [], [*self._secret]
        for part, is_answer in parts:
            part = self._special.sub(lambda match: self._secret[match[0]], part)
            part = re.sub(rf"{self._key}(\d+){self._key}", lambda match: names[int(match[1])], part)
            borders += [(len(text), len(text) + len(part))] if is_answer and part else []
            text += part
        found = self._tokenizer.encode(text, add_special_tokens=False)
        starts, ends = np.array(found.offsets, dtype=np.int64).reshape(-1, 2).T
        places = [np.flatnonzero((ends > start) & (starts < end)) for start, end in borders]
        return np.array(found.ids, dtype=np.int32), np.zeros(len(found.ids), dtype=bool), places


def environment(begin, end):
    """The sandbox of jinja2 in which transformers renders templates; begin and end come around generation marks."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return begin + caller() + end

    def refuse(reason):
        raise jinja2.TemplateError(reason)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    made.globals["raise_exception"] = refuse
    return made


class Conversations(Examples):
    """Examples whose targets are next tokens; padding on the right needs no mask, since no token sees later ones."""

    def batch(self, numbers, n_rows):
        """(ids (B, T), targets (B, T)) of some rows; B is n_rows, T a multiple of 8, or block_size."""
        ids, targets, *_ = super().batch(numbers, n_rows)
        return ids, F.pad(targets, (0, ids.shape[1] - targets.shape[1]), value=IGNORE)


class Instruct:
    """Gives the assistant's answers in conversations: a language model, trained on these alone."""

    has_head, metrics, has_classes, n_texts = False, (), True, (1,)  # see Classify
    defaults = {"text_column": "messages", "label_column": None}  # settings that the user has not given
    examples = Conversations

    @staticmethod
    def read(path, cfg, has_labels=True):
        """{name: its values, a list} of a file's columns; None, the answers within conversations: a list of ()."""
        in_messages = has_labels and cfg.label_column is None
        names = cfg.text_columns + [cfg.label_column] * (has_labels and not in_messages)
        columns = read_columns(path, names, cfg.tsv_columns)
        return columns | ({None: [()] * len(columns[names[0]])} if in_messages else {})

    def __init__(self, chat, framing):
        self.chat, self.framing = chat, framing

    def rows(self, texts, label, where):
        """The Row of a record, a list of messages, or the user's alone; [] where no answer begins within block_size.

        label: the answer, or () where the list holds it; None where the model is to answer.
        """
        [value], framing = texts, self.framing
        messages = self.messages(value, label, where)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if label is None:
            asked = messages[: len(messages) - (turns[-1:] == [len(messages) - 1])]
            ids = self.chat.prompt(asked, where)
            return [Row(ids, len(ids), np.full(len(ids), IGNORE), ids[:0], (ids, None))]
        if not turns:
            raise UserError(f"{where} has no turn of the assistant to learn from; add one, or leave the record out")
        ids, answers = self.chat.ids(messages, where)
        targets = np.append(np.where(answers[1:], ids[1:], IGNORE), IGNORE)[: framing.block_size]
        targets[framing.block_size - 1 :] = IGNORE  # the next token is cut off
        if (targets == IGNORE).all():
            framing.n_left_out += 1
            return []
        framing.n_cut += len(ids) > framing.block_size
        about = self.chat.prompt(messages[: turns[-1]], where), messages[turns[-1]]["content"]
        return [Row(ids[: framing.block_size], len(targets), targets, ids[:0], about)]

    def messages(self, value, label, where):
        """The messages of a record, checked."""
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
            raise UserError(f"{where} has {shown(value)}, where there must be a list of messages; check --text_column")
        if label not in (None, ()):
            messages = [*messages, {"role": "assistant", "content": label}]
        for message in messages:
            if (role := message.get("role")) not in ROLES:
                raise UserError(f"{where} has a message with the role {role!r}; roles are {', '.join(ROLES)}")
            if not isinstance(message.get("content"), str):
                rule = f"has {shown(message.get('content'))} as content of the {role}, where there must be text"
                raise UserError(f"{where} {rule}; mend the record, or leave it out")
            if odd := [key for key, part in message.items() if not isinstance(part, str | None)]:
                raise UserError(f"{where} has a message with {odd[0]}, which is no text; leave it out")
        return messages

    def figures(self, rows, texts):
        """{exact_match: share of the model's answers that equal the records' own}, without blanks around."""
        right = [text.strip() == row.about[1].strip() for row, text in zip(rows, texts) if row.about[1] is not None]
        return {"exact_match": sum(right) / len(right)} if right else {}

    def predictions(self, rows, texts):
        """A dict for each Row and the model's answer to it, in order; answer: the record's own, if it has one."""
        for row, text in zip(rows, texts):
            yield {"prediction": text} | ({} if row.about[1] is None else {"answer": row.about[1]})
