"""Whether two short answers have the same meaning after normalisation of their surface forms (semantic judge)."""

import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += ["seventeen", "eighteen", "nineteen"]
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBER_WORDS = {word: value for value, word in enumerate(ONES)}
_TENS_WORDS = {word: 10 * value for value, word in enumerate(TENS, start=2)}
_SCALES = {"thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₪": "shekel"}
_AMOUNT = re.compile(rf"([{''.join(_CURRENCY)}])\s*(-?\d(?:[\d.,]*\d)?(?:\s*(?:{'|'.join(_SCALES)})\b)?)")


def _table(text: str) -> dict[str, str]:
    """``"gray: grey; purple: violet lilac"`` -> every word after a colon mapped to the word before it."""
    entries = (entry.split(":") for entry in text.split(";"))
    return {word: target.strip() for target, words in entries for word in words.split()}


# Weights and pounds sterling are both "pound": a question is about one of them, never both.
_UNITS = _table(
    "percent: percent percentage pct percents; dollar: dollar dollars usd buck bucks; euro: euro euros eur; "
    "pound: pound pounds gbp lb lbs quid; yen: yen jpy; shekel: shekel shekels ils nis; cent: cent cents; "
    "kg: kg kgs kilo kilos kilogram kilograms kilogramme kilogrammes; g: g gram grams gramme grammes; mg: mg milligram "
    "milligrams; ton: t ton tons tonne tonnes; km: km kms kilometer kilometers kilometre kilometres; m: m meter meters "
    "metre metres; cm: cm centimeter centimeters centimetre centimetres; mm: mm millimeter millimeters millimetre "
    "millimetres; mile: mile miles mi; foot: foot feet ft; inch: inch inches; s: s sec secs second seconds; min: min "
    "mins minute minutes; hour: h hr hrs hour hours; day: day days; week: week weeks; month: month months; year: year "
    "years yr yrs; l: l liter liters litre litres; ml: ml milliliter milliliters millilitre millilitres; "
    "degree: degree degrees deg; celsius: celsius centigrade; fahrenheit: fahrenheit; mph: mph; kmh: kmh kph"
)
_WORDS = _table(
    "gray: grey; purple: violet lilac; cyan: aqua turquoise; magenta: fuchsia; pink: rose; beige: tan; gold: golden; "
    "silver: silvery; red: crimson scarlet; yes: yeah yep yup true; no: nope nay false; top: upper; bottom: lower; "
    "center: centre middle central; color: colour; car: automobile auto; bicycle: bike; television: tv; sofa: couch; "
    "airplane: plane aeroplane; phone: telephone cellphone; truck: lorry; january: jan; february: feb; march: mar; "
    "april: apr; june: jun; july: jul; august: aug; september: sep sept; october: oct; november: nov; december: dec"
)
_WHOLE = {"dark": "black"}  # only as a complete answer: "dark blue" is not black
_FILLERS = {"a", "an", "the", "in", "on", "at", "corner", "side"}
_LEAD_IN = re.compile(
    r"^(?:(?:the answer|it|that|there) is|it's|it (?:says|reads|shows)|(?:they|there) are|answer\s*:)\s+"
)
_PARTS = re.compile(r"\s*(?:[,;&\n]|\band\b)\s*")
_NUMBER_AND_UNIT = re.compile(rf"(?<!\S)(-?\d+(?:\.\d+)?)({'|'.join(_UNITS)})(?!\S)")


class Part(NamedTuple):
    """One part of an answer: a number with its unit ("" = none), or words."""

    number: Decimal | None
    text: str

    def same(self, other: "Part") -> bool:
        """Equal numbers, with equal units if both sides have one; or equal words."""
        if self.number is None or other.number is None:
            return self == other
        return self.number == other.number and (self.text == other.text or not self.text or not other.text)


def normalise(text: str) -> tuple[Part, ...]:
    """The parts of an answer in normal form.

    In this order: Unicode compatibility form, lower case; no lead-in ("the answer is"); currency and percent signs to
    words; no thousands separators; split at commas, semicolons, "and", "&"; punctuation and hyphens to spaces, except
    in numbers, times and fractions; no articles and fillers of place unless nothing else is left; number words to
    digits; units and synonyms to one form; a number with at most one unit to a quantity. 007 stays text: it is a code.
    """
    lowered = unicodedata.normalize("NFKC", text).lower().translate(str.maketrans("−–—’`", "---''")).strip()
    lowered = _LEAD_IN.sub("", lowered)
    lowered = _AMOUNT.sub(lambda m: f"{m[2]} {_CURRENCY[m[1]]} ", lowered)
    lowered = lowered.replace("%", " percent ").replace("per cent", "percent").replace("°c", " celsius ")
    lowered = lowered.replace("°", " degree ").replace("km/h", "kmh")
    lowered = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", lowered)
    return tuple(map(_part, filter(None, map(_tokens, _PARTS.split(lowered)))))


def same_meaning(prediction: str, answer: str) -> bool:
    """Whether both answers have equal parts in any order; for a yes/no answer the first word decides."""
    left, right = normalise(prediction), normalise(answer)
    if not left or not right:
        return prediction.strip().lower() == answer.strip().lower()
    if len(right) == 1 and right[0].text in ("yes", "no"):
        return left[0].text.split()[:1] == [right[0].text]
    return _same_parts(left, right)


def _same_parts(left: tuple[Part, ...], right: tuple[Part, ...]) -> bool:
    if not left or len(left) != len(right):
        return len(left) == len(right)
    rests = ((*right[:index], *right[index + 1 :]) for index, part in enumerate(right) if left[0].same(part))
    return any(_same_parts(left[1:], rest) for rest in rests)


def _tokens(piece: str) -> list[str]:
    """Words and numbers of one part; number words, units and synonyms in normal form."""
    piece = piece.replace("'", "")
    piece = re.sub(r"(?<=\w)-|-(?!\d)", " ", piece)  # a hyphen inside or after a word; a sign before a number stays
    piece = re.sub(r"(?<!\d)[:/]|(?<=[^\s\d-])\.|[.:/](?!\d)", " ", piece)  # kept: 3.5, .5, 10:30, 1/2
    piece = re.sub(r"[^\w.:/\s-]|_", " ", piece)
    words = _NUMBER_AND_UNIT.sub(r"\1 \2", piece).split()
    kept = [token for token in words if token not in _FILLERS] or words
    return [_WORDS.get(token, token) for token in _digits(kept)]


def _digits(tokens: list[str]) -> list[str]:
    """Number words 0-99 and scale words to digits: forty one -> 41, 2.5 million -> 2500000."""
    result: list[str] = []
    tens = False  # whether the last number was a tens word that a one may complete
    for token in tokens:
        one = _NUMBER_WORDS.get(token)
        if one is not None and tens and 1 <= one <= 9:
            result[-1], tens = str(int(result[-1]) + one), False
        elif token in _SCALES and result and (number := _number(result[-1])) is not None:
            result[-1], tens = f"{number * _SCALES[token]:f}", False
        else:
            tens = token in _TENS_WORDS
            result.append(str(_TENS_WORDS[token]) if tens else token if one is None else str(one))
    return result


def _number(token: str) -> Decimal | None:
    """The value of a plain number; None for words, times, fractions and codes with a leading zero."""
    if not re.fullmatch(r"-?\d+(?:\.\d+)?|\.\d+", token) or re.match(r"-?0\d", token):
        return None
    return Decimal(token)


def _part(tokens: list[str]) -> Part:
    numbers = [token for token in tokens if _number(token) is not None]
    units = [_UNITS[token] for token in tokens if token in _UNITS]
    if len(numbers) == 1 and len(units) <= 2 and len(numbers) + len(units) == len(tokens):
        unit = units[-1] if units[:1] == ["degree"] else " ".join(units)  # 5 degrees celsius = 5 celsius
        return Part(_number(numbers[0]), unit)
    text = " ".join(_UNITS.get(token, token) if len(token) > 2 else token for token in tokens)  # a letter is not a unit
    return Part(None, _WHOLE.get(text, text))
