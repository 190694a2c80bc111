"""1 where the final answer of a calculation is right."""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction

from jaxtune.core.errors import RequestError
from jaxtune.rl.rewards import arguments, latex_answer
from jaxtune.rl.rewards.reward import Scorer

# Longer numbers are no answers, and Python's conversions take time that grows with the square.
_MOST_DIGITS = 100
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus sign after a digit, a letter or a bracket subtracts.
_SIGNED = rf"(?:(?<![\w.)\]}}])[-+])?(?:{_NUMBER})(?:\s*/\s*(?:{_NUMBER}))?"
_WHOLE = re.compile(rf"([-+]?)((?:{_NUMBER}))(?:/((?:{_NUMBER})))?(?:e([-+]?\d{{1,2}}))?", re.I)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
_DRESS = re.compile(r"\\[!,;: ]|\\?[$%]|\\(?:left|right)\b|[\s£€]")


def math(column: str = "answer", last_number: bool = True, latex: bool = False) -> Scorer:
    """1.0 where the completion's final answer equals the record's, else 0.0.

    The answer of a completion is what stands in its last `\\boxed{}`, else after its last `####`,
    else its last number; that of a record is found the same way, or is the whole field. Numbers
    are compared exactly, as fractions: `1,200.50`, `$1200.5` and `2401/2` are equal, and so are
    `50%` and `50`. Other answers are compared as text without spaces and dollar signs.

    Args:
        column: field of the records: the answer, or a solution that ends in it (GSM8K's `#### 18`);
            None: no score.
        last_number: whether a completion without box and `####` answers with its last number; one
            that begins them and is cut off has no answer.
        latex: compare what is neither a number nor the same text with the package math-verify:
            expressions, intervals, sets, matrices.

    Raises:
        RequestError: `latex`, and the package is not installed.
    """
    arguments.text("column", column)
    arguments.flag("last_number", last_number)
    arguments.flag("latex", latex)
    if latex and importlib.util.find_spec("math_verify") is None:
        raise RequestError(
            "needs the package math-verify: pip install 'jaxtune[math]'", key="latex"
        )

    def score(prompts: list, completions: list, **columns: list) -> list[float | None]:
        scores: list[float | None] = []
        open_pairs: dict[int, tuple[str, str]] = {}
        for i, (completion, answer) in enumerate(zip(completions, columns[column], strict=True)):
            if answer is None:
                scores.append(None)
                continue
            gold = marked(str(answer)) or str(answer).strip()
            said = marked(completion)
            if said is None and last_number and not re.search(r"\\boxed\{|####", completion):
                said = last(completion)
            scores.append(float(said is not None and same(gold, said)))
            known = said is None or (rational(gold) is not None and rational(said) is not None)
            if latex and not scores[i] and not known:
                open_pairs[i] = (gold, said)
        if open_pairs:
            found = latex_answer.equal(list(open_pairs.values()))
            for i, equal in zip(open_pairs, found, strict=True):
                scores[i] = float(equal)
        return scores

    return Scorer(score, (column,))


def marked(text: str) -> str | None:
    """Returns what stands in the last `\\boxed{}`, else after the last `####`, else None.

    >>> marked("so it is #### 18 eggs"), marked(r"thus \\boxed{\\frac{1}{2}}.")
    ('18 eggs', '\\\\frac{1}{2}')
    """
    start = text.rfind("\\boxed{")
    if start >= 0:
        start += len("\\boxed{")
        depth = 1
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start:end].strip() or None
        return None  # cut off within the box
    _, mark, rest = text.rpartition("####")
    return (rest.strip().split("\n")[0].strip() or None) if mark else None


def numbers(text: str) -> list[str]:
    """Returns the numbers in a text, with their sign.

    >>> numbers("From 3-4 I get $-1,200.50; or 1/2.")
    ['3', '4', '-1,200.50', '1/2']
    """
    plain = text.replace("−", "-").replace("\\$", "").replace("$", "")
    return re.findall(_SIGNED, plain)


def last(text: str) -> str | None:
    """Returns the last number in a text."""
    found = numbers(text)
    return found[-1] if found else None


def rational(text: str) -> Fraction | None:
    """Returns the number that a text is, or None where it is something else.

    >>> rational("$1,200.50"), rational(r"-\\frac{3}{4}"), rational("50\\\\%"), rational("x")
    (Fraction(2401, 2), Fraction(-3, 4), Fraction(50, 1), None)
    """
    if len(text) > 4 * _MOST_DIGITS:
        return None
    plain = _DRESS.sub("", text.replace("−", "-")).rstrip(".")
    over = _FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", plain)
    if over != plain and not _FRACTION.fullmatch(plain.lstrip("+-")):
        return None  # a sum or product of fractions, or a mixed number
    match = _WHOLE.fullmatch(over.replace("/-", "/"))
    if match is None or max(map(len, filter(None, match.groups()))) > _MOST_DIGITS:
        return None
    sign, above, below, power = match.groups()
    number = Fraction(above.replace(",", "")) * Fraction(10) ** int(power or 0)
    if below is not None:
        below = Fraction(below.replace(",", ""))
        if below == 0:
            return None
        number /= -below if "/-" in over else below
    return -number if sign == "-" else number


def same(gold: str, said: str) -> bool:
    """Tells whether two answers are the same number, or the same text.

    >>> same("0.5", "1/2"), same("18", "18 eggs"), same("(1, 2)", "(1,2)"), same("x", "y")
    (True, True, True, False)
    """
    value = rational(gold)
    if value is None:
        return _bare(gold) == _bare(said)
    other = rational(said)
    if other is None:
        # GSM8K's models write a unit behind the number; a formula is not read this way.
        found = [] if "\\" in said else numbers(said)
        other = rational(found[0]) if len(found) == 1 else None
    return value == other


def _bare(text: str) -> str:
    return (
        _DRESS.sub("", text).rstrip(".").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    )
