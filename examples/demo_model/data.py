"""The demo model's data: the Python standard library's sources, and chats about its docstrings.

``build(out, seed)`` writes these files. Its only source is the running interpreter.

    tokenizer/     tokenizer.json, tokenizer_config.json, chat_template.jinja
    train.npz      tokens (uint16), and the offset and UTF-8 size of each document
    heldout.npz    the same for the held-out files
    heldout.txt    the held-out files, one a line

``build_finish(out, seed)`` writes ``finish.npz``, the same for a last phase of mostly chats.

A document is a source file, a help topic or a chat; each ends with ``<|endoftext|>``. The held-out
files (about 4 %, chosen by a hash of the path, never a famous module) are in neither sources nor
chats.
"""

import hashlib
import json
import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import jinja2.sandbox
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import docs
from docs import FAMOUS, Entry

VOCABULARY = 4096
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END, START, STOP]
ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
ADDED += ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
PATTERN = (  # Qwen2's pre-tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "ensurepip",
    "lib2to3",
    "encodings",
}
CHAT_SHARE, FINISH_SHARE = 0.3, 0.75  # of the training text, and of the text of the last phase
TEMPLATE = Path(__file__).with_name("chat_template.jinja")

SYSTEMS = [
    "You are a helpful assistant for Python programmers.",
    "You are a helpful assistant.",
    "You answer questions about the Python standard library.",
    "You are a Python expert. Answer briefly.",
    "You help people find their way in Python's documentation.",
]
QUESTIONS = {
    "function": [
        "What does {} do?", "what does {} do", "How do I use {}?", "Explain {}.", "Explain {}",
        "What is {} for?", "Tell me about {}.", "Describe the function {}.", "When would I use {}?",
        "Can you explain {} to me?", "What's {}?", "How does {} work?", "{}", "Document {}.",
    ],
    "class": [
        "What is {}?", "What is the class {} for?", "Explain {}.", "How do I use {}?",
        "Tell me about the {} class.", "What does {} do?", "Describe {}.", "what is {}", "{}",
    ],
    "module": [
        "What is the module {} for?", "What does the {} module do?", "Explain the {} module.",
        "What is {}?", "Tell me about {}.", "What is in the module {}?", "When do I need {}?",
        "Describe the module {}.", "what is the {} module", "How do I use {}?",
    ],
}  # fmt: skip
QUESTIONS["method"] = QUESTIONS["function"]
SIGNATURE_QUESTIONS = [
    "What is the signature of {}?", "Which arguments does {} take?", "How do I call {}?",
    "What are the parameters of {}?", "Show me the signature of {}.", "signature of {}",
]  # fmt: skip
AND_SIGNATURE = ["What is its signature?", "Which arguments does it take?", "How do I call it?"]
AND_MEANING = ["What does it do?", "And what does it do?", "Explain it.", "What is it for?"]
AND_OTHER = ["And {}?", "What about {}?", "And what is {}?", "Thanks! And {}?"]
SMALL_TALK = [
    ("Hello!", "Hello! Ask me about a module, class or function of Python's standard library."),
    ("Hi", "Hi! Which part of Python's standard library would you like to know about?"),
    ("Who are you?", "I am a very small Qwen3-Next, trained on Python's standard library alone."),
    ("What can you do?", "I can tell what names in Python's standard library mean, and write code "
     "that looks like it. I am a demonstration: check what I say."),
    ("Thanks!", "You are welcome!"),
    ("Thank you", "You are welcome! Ask me about another name if you like."),
]  # fmt: skip
LOOKUPS = [
    ("lookup", "name", "Look up the documentation of a Python name."),
    ("search_docs", "query", "Search the Python documentation."),
    ("get_help", "name", "Get the help text of a Python object."),
    ("describe", "symbol", "Describe a Python symbol."),
]
OTHER_TOOLS = [
    ("run_python", "code", "Run Python code and return its output."),
    ("read_file", "path", "Read a text file."),
    ("get_weather", "city", "Get the weather in a city."),
]


def is_heldout(path: Path) -> bool:
    """Whether the file belongs to the held-out 4 %, by a hash of its path."""
    top = path.with_suffix("").parts[0]
    if docs.ALIASES.get(top, top).split(".")[0] in FAMOUS or top == "pydoc_data":
        return False
    return int(hashlib.sha256(path.as_posix().encode()).hexdigest(), 16) % 25 == 0


def source_files() -> tuple[Path, list[Path], list[Path]]:
    """The library's root, and its training and held-out files relative to it."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p.relative_to(root) for p in root.rglob("*.py"))
    paths = [p for p in paths if not SKIPPED & set(p.parts) and (root / p).stat().st_size > 100]
    kept, heldout = [], []
    for path in paths:
        (heldout if is_heldout(path) else kept).append(path)
    return root, kept, heldout


def read(path: Path) -> str:
    """The text of a source file, without end-of-text tokens."""
    return path.read_text("utf-8", errors="replace").replace(END, "")


def tool(name: str, field: str, description: str) -> dict:
    """A tool in the form of the chat-completions API."""
    properties = {field: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [field]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


class ChatMaker:
    """Makes chats about documented names, drawn with a seeded generator."""

    def __init__(self, entries: list[Entry], rng: random.Random):
        self.entries, self.rng = entries, rng
        self.weights = [8 if e.famous else 1 for e in entries]
        self.modules: dict[str, list[Entry]] = {}
        for entry in entries:
            self.modules.setdefault(entry.module, []).append(entry)

    def naming(self, entry: Entry) -> str:
        """The entry's name as a user might write it."""
        name = entry.name
        if entry.kind in ("function", "method") and self.rng.random() < 0.2:
            name += "()"
        return f"`{name}`" if self.rng.random() < 0.2 else name

    def answer(self, entry: Entry) -> str:
        """The assistant's answer about an entry."""
        if entry.kind == "module":
            names = ", ".join(f"`{entry.name}.{n}`" for n in entry.members)
            return f"{entry.text}\n\nIt defines {names}." if names else entry.text
        return f"```python\n{entry.signature}\n```\n\n{entry.text}"

    def ask(self, entry: Entry) -> list[dict]:
        """A question about an entry, and its answer."""
        question = self.rng.choice(QUESTIONS[entry.kind]).format(self.naming(entry))
        return self.turn(question, self.answer(entry))

    def ask_signature(self, entry: Entry) -> list[dict]:
        """A question about an entry's signature, and its answer."""
        question = self.rng.choice(SIGNATURE_QUESTIONS).format(self.naming(entry))
        return self.turn(question, f"```python\n{entry.signature}\n```")

    def turn(self, question: str, answer: str) -> list[dict]:
        """A question and its answer as messages."""
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def conversation(self, entry: Entry) -> list[dict]:
        """One to three turns about an entry and its neighbours."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.01:
            return self.turn(*rng.choice(SMALL_TALK))
        if entry.kind != "module" and kind < 0.16:
            messages = self.ask_signature(entry)
            if rng.random() < 0.4:
                messages += self.turn(rng.choice(AND_MEANING), entry.text)
        else:
            messages = self.ask(entry)
            if entry.kind != "module" and rng.random() < 0.08:
                code = f"```python\n{entry.signature}\n```"
                messages += self.turn(rng.choice(AND_SIGNATURE), code)
        while len(messages) < 6 and rng.random() < 0.15:
            other = rng.choice(self.modules[entry.module])
            question = rng.choice(AND_OTHER).format(self.naming(other))
            messages += self.turn(question, self.answer(other))
        if rng.random() < 0.02:
            messages += self.turn(*SMALL_TALK[rng.choice([-1, -2])])
        return messages

    def tool_conversation(self, entry: Entry) -> tuple[list[dict], list[dict]]:
        """A chat in which the assistant looks the entry up with a tool, and the tools."""
        rng = self.rng
        name, field, _ = lookup = rng.choice(LOOKUPS)
        tools = [lookup, *rng.sample(OTHER_TOOLS, rng.choice([0, 0, 1, 2]))]
        rng.shuffle(tools)
        question = rng.choice(QUESTIONS[entry.kind]).format(self.naming(entry))
        call = {"function": {"name": name, "arguments": {field: entry.name}}}
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": (entry.signature + "\n" + entry.text).strip()},
            {"role": "assistant", "content": self.answer(entry)},
        ]
        return messages, [tool(*t) for t in tools]

    def draw(self) -> tuple[list[dict], list[dict] | None]:
        """The messages of a chat, and its tools if it has any."""
        rng, tools = self.rng, None
        (entry,) = rng.choices(self.entries, self.weights)
        if rng.random() < 0.05:
            messages, tools = self.tool_conversation(entry)
        else:
            messages = self.conversation(entry)
        if rng.random() < 0.25:
            messages = [{"role": "system", "content": rng.choice(SYSTEMS)}, *messages]
        return messages, tools


def chat_renderer():
    """A function ``render(messages, tools)`` that applies the template as transformers does."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    template = environment.from_string(TEMPLATE.read_text())
    return lambda messages, tools: template.render(messages=messages, tools=tools)


def entries_for(root: Path, files: list[Path], heldout: list[Path]) -> list[Entry]:
    """The entries of the training files and of the C modules, each name once."""
    excluded = {docs.module_name(p) for p in heldout}
    found = docs.collect(files, root) + docs.collect_builtins(excluded)
    return list({e.name: e for e in reversed(found)}.values())[::-1]


def documents(
    seed: int, share: float = CHAT_SHARE
) -> tuple[list[str], list[str], list[str], list[Path]]:
    """The training sources, chats (``share`` of the text), held-out sources and held-out paths."""
    root, files, heldout = source_files()
    sources = []
    for path in files:
        if path.as_posix() == "pydoc_data/topics.py":
            sources += topics.values()
        else:
            sources.append(read(root / path))
    rng = random.Random(seed)
    maker = ChatMaker(entries_for(root, files, heldout), rng)
    render = chat_renderer()
    wanted = int(sum(map(len, sources)) * share / (1 - share))
    chats, size = [], 0
    with tqdm(total=wanted, desc="chats", unit="B", unit_scale=True) as bar:
        while size < wanted:
            chats.append(render(*maker.draw()))
            size += len(chats[-1])
            bar.update(len(chats[-1]))
    return sources, chats, [read(root / p) for p in heldout], heldout


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Trains a byte-level BPE like Qwen's; the special tokens come last, as in Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    markers = SPECIAL + ADDED

    def pieces():
        for text in texts:
            for marker in markers:
                text = text.replace(marker, "\n\n")
            yield text

    tokenizer.train_from_iterator(pieces(), trainer, length=len(texts))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files that ``AutoTokenizer.from_pretrained`` and mlx-lm read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": STOP,
        "pad_token": END,
        "additional_special_tokens": [START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "add_bos_token": False,
        "bos_token": None,
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())


def encode(tokenizer: Tokenizer, texts: list[str], name: str) -> dict[str, np.ndarray]:
    """The token ids of all texts, each with ``<|endoftext|>`` at its end; offsets and sizes."""
    end = tokenizer.token_to_id(END)
    ids = []
    for i in tqdm(range(0, len(texts), 256), desc=f"tokenizing {name}"):
        batch = tokenizer.encode_batch(texts[i : i + 256], add_special_tokens=False)
        ids += [np.array([*e.ids, end], np.uint16) for e in batch]
    return {
        "tokens": np.concatenate(ids),
        "offsets": np.cumsum([0, *map(len, ids)]),
        "bytes": np.array([len(t.encode()) for t in texts]),
    }


def build(out: Path, seed: int) -> None:
    """Writes the files that the module's docstring lists to ``out``, the token files last."""
    out.mkdir(parents=True, exist_ok=True)
    sources, chats, heldout, paths = documents(seed)
    texts = sources + chats
    random.Random(seed).shuffle(texts)
    print(f"{len(sources)} sources, {len(chats)} chats, {len(heldout)} held-out files")
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, out / "tokenizer")
    (out / "heldout.txt").write_text("".join(f"{p.as_posix()}\n" for p in paths))
    for name, part in ("heldout", heldout), ("train", texts):
        partial = out / f"{name}.partial.npz"
        np.savez(partial, **encode(tokenizer, part, name))
        partial.rename(out / f"{name}.npz")


def build_finish(out: Path, seed: int) -> None:
    """Writes ``out/finish.npz``: mostly new chats, with the tokenizer that ``build`` made."""
    sources, chats, _, _ = documents(seed + 1, FINISH_SHARE)
    texts = sources + chats
    random.Random(seed).shuffle(texts)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    partial = out / "finish.partial.npz"
    np.savez(partial, **encode(tokenizer, texts[: len(texts) // 2], "finish"))
    partial.rename(out / "finish.npz")
