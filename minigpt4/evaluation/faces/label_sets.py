"""The closed sets that face data sets ask for, in their official orders, with the words people use for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minigpt4.common.errors import ConfigError, nearest
from minigpt4.metrics.labels import LabelSet

_EMOTIONS: tuple[tuple[str, ...], ...] = (
    ("neutral", "neutrality", "calm", "expressionless", "emotionless", "no emotion", "no expression", "composed"),
    ("happy", "happiness", "happily", "joy", "joyful", "joyous", "cheerful", "delighted", "pleased", "smiling"),
    ("sad", "sadness", "sadly", "sorrow", "sorrowful", "unhappy", "unhappiness", "melancholy", "gloomy", "grief"),
    ("angry", "anger", "angrily", "angered", "furious", "fury", "rage", "enraged", "mad", "irritated", "annoyed"),
    ("surprised", "surprise", "astonished", "astonishment", "amazed", "amazement", "shocked", "shock", "startled"),
    ("fearful", "fear", "afraid", "scared", "frightened", "terrified", "terror"),
    ("disgusted", "disgust", "disgusting", "revulsion", "repulsed"),
    ("contempt", "contemptuous", "disdain", "disdainful", "scorn", "scornful"),
)
_NO_WORDS = ("not", "isn't", "aren't", "doesn't", "don't")
_ROMAN = ("I", "II", "III", "IV", "V", "VI")
AGE_BINS = ((0, 2), (3, 9), (10, 19), (20, 29), (30, 39), (40, 49), (50, 59), (60, 69), (70, 130))


def emotion_set(name: str, labels: Sequence[str]) -> LabelSet:
    """Emotions under the names and in the order of a data set; each name must be a word of one known emotion."""
    families = {label: next(words for words in _EMOTIONS if label.lower() in words) for label in labels}
    synonyms = {label: [word for word in words if word != label.lower()] for label, words in families.items()}
    return LabelSet(name, tuple(labels), synonyms)


def presence_set(name: str, words: Sequence[str]) -> LabelSet:
    """Yes or No to whether something is there: its name alone means Yes, its negation No."""
    return LabelSet(name, ("Yes", "No"), {"Yes": tuple(words), "No": _NO_WORDS}, opposites={"Yes": "No"}, leads=True)


AFFECTNET8 = emotion_set("expression", ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt"))
AFFECTNET7 = emotion_set("expression", AFFECTNET8.labels[:7])
RAF_DB = emotion_set("expression", ("Surprise", "Fear", "Disgust", "Happiness", "Sadness", "Anger", "Neutral"))
FER2013 = emotion_set("expression", ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral"))
FERPLUS = emotion_set(
    "expression", ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
)
EMOTION8 = emotion_set("emotion", ("Happy", "Sad", "Angry", "Surprised", "Fearful", "Disgusted", "Neutral", "Contempt"))
YES_NO = presence_set("yes or no", ())
HUMAN = presence_set(
    "human", ("human", "humans", "person", "people", "man", "woman", "boy", "girl", "child", "face", "individual")
)
GENDER = LabelSet(
    "gender",
    ("Male", "Female"),
    {
        "Male": ("man", "men", "boy", "masculine", "gentleman", "he", "males"),
        "Female": ("woman", "women", "girl", "feminine", "lady", "she", "females"),
    },
)
AGE = LabelSet(
    "age",
    ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"),
    {
        "0-2": ("baby", "infant", "toddler"),
        "10-19": ("teenager", "teenage", "teen", "adolescent"),
        "20-29": ("twenties",),
        "30-39": ("thirties",),
        "40-49": ("forties",),
        "50-59": ("fifties",),
        "60-69": ("sixties",),
        "more than 70": ("over 70", "older than 70", "seventies", "eighties", "nineties", "70+"),
    },
    is_ordinal=True,
    bins=AGE_BINS,
)
FAIRFACE_RACE = LabelSet(
    "race",
    ("White", "Black", "Latino_Hispanic", "East Asian", "Southeast Asian", "Indian", "Middle Eastern"),
    {
        "White": ("caucasian", "european"),
        "Black": ("african", "african american"),
        "Latino_Hispanic": ("latino", "latina", "hispanic", "latino or hispanic", "hispanic or latino"),
        "East Asian": ("chinese", "japanese", "korean"),
        "Southeast Asian": ("south east asian",),
        "Indian": ("south asian",),
        "Middle Eastern": ("arab",),
    },
)
UTKFACE_RACE = LabelSet(
    "race",
    ("White", "Black", "Asian", "Indian", "Others"),
    {
        "White": ("caucasian", "european"),
        "Black": ("african", "african american"),
        "Asian": ("east asian", "southeast asian", "chinese", "japanese", "korean"),
        "Indian": ("south asian",),
        "Others": ("other", "hispanic", "latino", "latina", "middle eastern"),
    },
)
FITZPATRICK = LabelSet(
    "skin type",
    tuple(f"Type {numeral}" for numeral in _ROMAN),
    {
        f"Type {numeral}": (
            f"type {number}", f"fitzpatrick {number}", f"fitzpatrick {numeral}", *(() if numeral == "I" else (numeral,))
        )
        for number, numeral in enumerate(_ROMAN, start=1)
    },
    whole={f"Type {numeral}": (numeral, str(number)) for number, numeral in enumerate(_ROMAN, start=1)},
    is_ordinal=True,
)  # fmt: skip
INTENSITY = LabelSet(
    "intensity",
    ("Low", "Medium", "High"),
    {
        "Low": ("mild", "mildly", "slight", "slightly", "subtle", "weak", "faint", "minimal"),
        "Medium": ("moderate", "moderately", "average", "medium to high", "moderate to high"),
        "High": ("strong", "strongly", "intense", "extreme", "extremely", "pronounced", "very strong"),
    },
    is_ordinal=True,
)

LABEL_SETS: Mapping[str, LabelSet] = {
    "emotion": EMOTION8,
    "yes_no": YES_NO,
    "human": HUMAN,
    "gender": GENDER,
    "age": AGE,
    "race": FAIRFACE_RACE,
    "fitzpatrick": FITZPATRICK,
    "intensity": INTENSITY,
}
"""What --label-set may name."""

ATTRIBUTES: tuple[LabelSet, ...] = (
    EMOTION8,
    LabelSet("hair colour", ("black hair", "brown hair", "blond hair", "red hair", "grey hair", "white hair"), {
        "black hair": ("black-haired", "dark hair"),
        "brown hair": ("brunette", "brown-haired"),
        "blond hair": ("blonde hair", "blonde", "blond"),
        "red hair": ("red-haired", "ginger hair"),
        "grey hair": ("gray hair", "grey-haired"),
    }),
    LabelSet("hair style", ("bald", "short hair", "long hair", "curly hair", "straight hair", "wavy hair", "ponytail")),
    LabelSet("facial hair", ("beard", "moustache", "stubble", "clean-shaven"), {
        "beard": ("bearded",), "moustache": ("mustache",), "clean-shaven": ("no beard", "shaven"),
    }),
    LabelSet("worn", ("glasses", "sunglasses", "hat", "earrings", "necklace", "tie", "scarf", "makeup", "mask"), {
        "glasses": ("eyeglasses", "spectacles"), "hat": ("cap",), "makeup": ("make-up", "lipstick"),
    }),
    LabelSet("eyes", ("eyes closed", "eyes open", "blue eyes", "brown eyes", "green eyes"), {
        "eyes closed": ("closed eyes",), "eyes open": ("open eyes", "wide eyes", "widened eyes"),
    }),
    LabelSet("mouth", ("smile", "frown", "open mouth", "closed mouth", "teeth"), {
        "smile": ("smiles", "grin"), "frown": ("frowning", "furrowed brow", "furrowed brows"),
        "open mouth": ("mouth open", "mouth is open"), "closed mouth": ("mouth closed", "mouth is closed"),
    }),
    LabelSet("head", ("left", "right", "frontal", "tilted"), {"frontal": ("facing the camera", "straight ahead")}),
    LabelSet("person", ("man", "woman", "boy", "girl", "child", "baby"), {"man": ("male",), "woman": ("female",)}),
    LabelSet("age", ("young", "middle-aged", "old"), {"old": ("elderly", "older")}),
    FITZPATRICK,
)  # fmt: skip
"""What the attribute recall of descriptions looks for."""


def named_label_set(name: str) -> LabelSet:
    """One of LABEL_SETS. Raises ConfigError that lists them."""
    if name not in LABEL_SETS:
        known = ", ".join(LABEL_SETS)
        raise ConfigError(f"--label-set: unknown '{name}'{nearest(name, LABEL_SETS)}; known: {known}")
    return LABEL_SETS[name]


def labels_of(references: Sequence[str], name: str) -> LabelSet | None:
    """The label set that references are from; None for free text.

    A known set when every reference is one of its labels; emotions under other names; else, for at most 40 different
    references of at most four words that repeat, a set of their own in alphabetical order.
    """
    spellings = {text.lower(): text for text in (reference.strip().rstrip(".") for reference in reversed(references))}
    for known in LABEL_SETS.values():
        if spellings.keys() <= {label.lower() for label in known.labels}:
            return known
    is_closed = 1 < len(spellings) <= 40 and 2 * len(spellings) <= len(references)
    if not is_closed or max(len(text.split()) for text in spellings) > 4:
        return None
    labels = tuple(sorted(spellings.values()))
    meant = [next((words[0] for words in _EMOTIONS if text in words), text) for text in spellings]
    if len(set(meant)) == len(meant) and all(any(word in words for words in _EMOTIONS) for word in meant):
        return emotion_set(name, labels)
    return LabelSet(name, labels)
