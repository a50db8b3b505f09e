"""Rules on the text that neither host compiler enforces but Metal's does."""

from __future__ import annotations

import re

from .translate import blank, blank_comments

_SPACE = re.compile(r"\b(device|constant|threadgroup|thread)\b")
_NOT_A_FUNCTION = {"if", "for", "while", "switch", "return", "sizeof", "decltype", "static_assert"}
_SCALAR = (
    r"float|half|bfloat|bfloat16_t|bool|char|uchar|short|ushort|int|uint|long|ulong|size_t|"
    r"u?int\d+_t|(?:bfloat|float|half|u?int|u?short|u?char)[234]|[A-Z]\w*"
)
_LOCAL = re.compile(
    rf"(?:^|[;{{}}(])\s*((?:const\s+)?(?:{_SCALAR})(?:\s+const)?\s*[*&]\s*\w+)\s*=(?!=)",
    re.MULTILINE,
)
_BANNED = {
    "a lambda": re.compile(r"(?<![\w\])\[])\s*\[\s*[&=]?[\w\s,&=]*\]\s*\([^()]*\)\s*[^{;,()]*\{"),
    "a static variable in a function": re.compile(
        r"[{;]\s*static\s+(?!constexpr|constant|const|inline|_assert)\w"
    ),
    "goto": re.compile(r"\bgoto\b"),
    "a union": re.compile(r"\bunion\s*\w*\s*\{"),
    "long long": re.compile(r"\blong\s+long\b"),
    "double": re.compile(r"\bdouble\b"),
    "std::": re.compile(r"\bstd::"),
    "new or delete": re.compile(r"\b(?:new|delete)\s+\w"),
    "a virtual function": re.compile(r"\bvirtual\b"),
    "an exception": re.compile(r"\b(?:throw|try|catch)\b"),
    "an array of variable size": re.compile(r"\balloca\s*\("),
}


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one before `start`."""
    depth, at = 1, start
    while depth and at < len(text):
        depth += (text[at] == "(") - (text[at] == ")")
        at += 1
    return at


def _parameters(text: str) -> list[tuple[int, str]]:
    """The parameters of a list without its parentheses, each with its offset."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text + ","):
        depth += (character in "<([{") - (character in ">)]}")
        if character == "," and depth == 0:
            found.append((start, text[start:at].split("=")[0]))
            start = at + 1
    return found


def _parameters_without_space(text: str) -> list[tuple[int, str]]:
    """Pointer and reference parameters of function definitions that name no address space."""
    found = []
    for function in re.finditer(r"(\w+)\s*\(", text):
        end = _closing(text, function.end())
        definition = re.match(
            r"\s*(const\s*)?(thread|device|constant|threadgroup)?\s*\{", text[end:]
        )
        if function.group(1) in _NOT_A_FUNCTION or not definition:
            continue
        for offset, parameter in _parameters(text[function.end() : end - 1]):
            if re.search(r"[*&]", parameter) and not _SPACE.search(parameter):
                words = " ".join(parameter.split())
                found.append((function.end() + offset, f"parameter without address space: {words}"))
    return found


def lint(source: str) -> list[str]:
    """The breaches of the rules, each with its line in the text."""
    text = re.sub(r"\[\[.*?\]\]", lambda found: blank(found.group()), blank_comments(source))
    found = _parameters_without_space(text)
    for local in _LOCAL.finditer(text):
        words = " ".join(local.group(1).split())
        found.append((local.start(1), f"pointer or reference without address space: {words}"))
    for what, pattern in _BANNED.items():
        found += [(match.start(), f"{what} is not Metal") for match in pattern.finditer(text)]
    return [f"line {text.count(chr(10), 0, at) + 1}: {what}" for at, what in sorted(found)]
