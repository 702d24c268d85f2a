"""Chat templates of opened models, and their answers in conversations."""

import json
from pathlib import Path

from checkpoint import checkpoints
from config import UserError
from generation import GenerationConfig
from interop.harness import generate_texts
from interop.pretrained import CHAT_FILE, load_model
from interop.tokenizer import by_role, hub_json
from run.folder import writing_to
from text.chat import Chat, plain_template
from text.files import read_text


def open_chat(source, tokenizer, template=None):
    """The Chat of an opened model, with its own template or the one given; UserError where there is none."""
    own, names = source.chat
    if (template := own if template is None else template) is None:
        raise UserError(f"{source.folder} has no chat template; fine-tune it by finetune.py --task=instruct")
    names = {f"{role}_token": name for role, name in by_role(tokenizer.specials, "clm").items()} | names
    return Chat(template, names, hub_json(tokenizer))


def starting_chat(source, tokenizer, file=None):
    """The Chat to fine-tune an opened model by: with a file's template, the model's own, or one of plain text."""
    own, names = source.chat
    if file:
        return open_chat(source, tokenizer, read_text(f"FILE:{file}", "chat_template"))
    if own is None:
        end = names.get("eos_token") or by_role(tokenizer.specials, "clm").get("eos")
        if end is None:
            what = f"{source.folder} has no chat template and its tokenizer no end-of-text to end answers with"
            raise UserError(f"{what}; give one by --chat_template=FILE")
        begin = "".join(name for id_ in tokenizer.begin for name, id in tokenizer.specials.items() if id == id_)
        own = plain_template(begin, end)
    return open_chat(source, tokenizer, own)


def keep_chat(chat, tokenizer, out_dir):
    """Writes a chat's template, and the ids that end a text or an answer, into a run's folder."""
    kept = {"chat_template": chat.template, "eos_token_id": sorted(tokenizer.stops | chat.ends)}
    with writing_to(out_dir):
        (Path(out_dir) / CHAT_FILE).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def answer_rows(cfg, task, rows, world):
    """The greedy answers to the prompts of Rows, on each rank, by a run's best checkpoint, which each rank holds whole.

    A prompt that leaves no room in the model's context has the answer "", and is counted. cfg: finetune.py's Settings.
    """
    where = cfg.run.out_dir if checkpoints(cfg.run.out_dir) else cfg.run.init_from
    model = load_model(where, world.device, world)[0].to(world.dtype)
    room = [model.cfg.block_size - len(row.about[0]) for row in rows]
    if world.is_main and (n_full := sum(n < 1 for n in room)):
        print(f"answers    {n_full:,} prompts fill the model's context, {model.cfg.block_size} tokens, and get none")
    asked = [i for i, n in enumerate(room) if n > 0]
    most = cfg.generation.max_new_tokens
    requests = [(rows[i].about[0].tolist(), [], GenerationConfig(min(most, room[i]), temperature=0.0)) for i in asked]
    found = dict(zip(asked, generate_texts(model, task.framing.tokenizer, requests, world)))
    return [found.get(i, "") for i in range(len(rows))]
