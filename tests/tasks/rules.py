"""What Python goes on with after each task's prompts: read off the prompt, without the generator.

Each rule gives text that completes the prompt to code that parses, and that begins with the answer.
"""

import ast
import re
from collections.abc import Callable

# The rest of a line that opens a block, and a block deeper than any.
BLOCK = f":\n{' ' * 60}pass\n"


def open_quote(code: str) -> str | None:
    """The quote of the string that is open at the end of the code, or None."""
    quote = None
    for character in code:
        if character == quote:
            quote = None
        elif quote is None and character in "'\"":
            quote = character
    return quote


def open_brackets(code: str) -> str:
    """The brackets that are open at the end of the code, outside of strings or inside of one."""
    opened: list[str] = []
    for character in code:
        if character in "([{":
            opened.append(character)
        elif character in ")]}":
            assert opened.pop() + character in ("()", "[]", "{}")
    return "".join(opened)


def last_line(prompt: str) -> str:
    return prompt.rstrip("\n").split("\n")[-1]


def first_word(prompt: str) -> str:
    return re.split(r"\W", last_line(prompt).strip())[0]


def parses(code: str) -> bool:
    """Whether it is Python. Indented code may stand in a block, or in one that follows another."""
    try:
        ast.parse("if 1:\n" + code if code.startswith(" ") else code)
    except SyntaxError:
        return False
    return True


def close_quote(prompt: str) -> str:
    quote = open_quote(prompt)
    closing = {"(": ")", "[": "]", "{": "}"}
    brackets = "".join(closing[b] for b in reversed(open_brackets(prompt.split(quote)[0])))
    end = BLOCK if first_word(prompt) in ("if", "while") else "\n"
    return f"{quote} % x{brackets}{end}"


def close_brackets(prompt: str) -> str:
    assert open_quote(prompt) is None
    return {"[": "]", "[[": "]]", "{": "}"}[open_brackets(prompt)] + "\n"


def close_field(prompt: str) -> str:
    quote = open_quote(prompt)
    outside, inside = prompt.split(quote, 1)
    assert outside.endswith("f")
    (opened,) = open_brackets(inside)
    return f"{'}' if opened == '{' else ')'} {quote}{')' * len(open_brackets(outside))}\n"


def add_an_element(prompt: str) -> str:
    name = last_line(prompt).strip()
    ((_, value),) = re.findall(rf"^( *){name} = (.*)$", prompt, re.M)
    return ".add(1)\n" if hasattr(ast.literal_eval(value), "add") else " += 'x'\n"


def else_or_elif(prompt: str) -> str:
    line = last_line(prompt)
    indent = line[: -len(line.strip())]
    if line.strip() == "else":
        return BLOCK
    condition = re.findall(rf"^{indent}if (\w+)", prompt, re.M)[-1]
    return f" {condition} x{BLOCK}" if condition == "not" else f" {condition}{BLOCK}"


def swapped(prompt: str) -> str:
    names = re.findall(r"\w+", last_line(prompt))
    (missing,) = [name for name in names if names.count(name) == 1]
    assert len(names) == 3 and names[1] == names[2]
    return f" {missing}{')' if open_brackets(prompt) else ''}\n"


def indented(prompt: str) -> str:
    line = last_line(prompt)
    depth = len(line) - len(line.lstrip()) + 4 * line.endswith(":")
    return " " * depth + "pass\n"


def after_arguments(prompt: str) -> str:
    close = ")" * len(open_brackets(last_line(prompt))) + "\n"
    return f": 0{close}" if "lambda" in last_line(prompt) else close


def iterated(prompt: str) -> str:
    variables = re.fullmatch(r" *for (.*) in", last_line(prompt))[1].split(", ")
    return {1: " range(3)", 2: " enumerate(x)"}[len(variables)] + BLOCK


def passed_on(prompt: str) -> str:
    ((one, two),) = re.findall(r"\*(\w+), \*\*(\w+)\):$", prompt, re.M)
    last = re.fullmatch(r".*[ (](\*+\w+)", last_line(prompt))[1]
    return {f"*{one}": f", **{two})\n", f"**{two}": ")\n"}[last]


def first_function(prompt: str) -> str:
    around = re.findall(r"^(class|def) ", prompt, re.M)[-1]
    return {"class": " __init__(self)", "def": " wrapper()"}[around] + BLOCK


def by_first_word(**rests: str) -> Callable[[str], str]:
    """By the first word of the last line; `other` stands for all that are not named."""
    return lambda prompt: rests.get(first_word(prompt), rests.get("other"))


RULES: dict[str, Callable[[str], str]] = {
    "bracket_brace": close_brackets,
    "bracket_counting": close_brackets,
    "class_init": first_function,
    "else_elif": else_or_elif,
    "enumerate_range": iterated,
    "final_kwarg": passed_on,
    "for_while": by_first_word(**{"for": " in x" + BLOCK, "while": BLOCK}),
    "fstring_brace": close_field,
    "if_equals": by_first_word(**{"if": " == 0" + BLOCK, "other": " = 0\n"}),
    "if_ternary": by_first_word(**{"if": BLOCK, "other": " else 0\n"}),
    "indent_for": indented,
    "lambda_func": after_arguments,
    "set_or_string": add_an_element,
    "set_or_string_fixedvarname": add_an_element,
    "single_double_quote": close_quote,
    "var_if": by_first_word(**{"if": BLOCK, "other": " = x()\n"}),
    "var_swap": swapped,
    "while_return_true": by_first_word(**{"while": BLOCK, "return": "\n"}),
    "with_as": by_first_word(**{"with": ") as x" + BLOCK, "if": ")" + BLOCK}),
    "with_open": by_first_word(**{"with": ") as x" + BLOCK, "other": ")\n"}),
}

# Where the grammar would take the other answer too, and meaning or habit decides: values of another
# type, names, a comparison as a statement, `with` without `as`, `while x in y`.
GRAMMAR_LEAVES_OPEN: dict[str, Callable[[str], bool]] = {
    "class_init": lambda prompt: True,
    "enumerate_range": lambda prompt: True,
    "final_kwarg": lambda prompt: True,
    "for_while": lambda prompt: first_word(prompt) == "while",
    "if_equals": lambda prompt: first_word(prompt) != "if",
    "set_or_string": lambda prompt: True,
    "set_or_string_fixedvarname": lambda prompt: True,
    "var_swap": lambda prompt: True,
    "with_as": lambda prompt: first_word(prompt) == "with",
}
