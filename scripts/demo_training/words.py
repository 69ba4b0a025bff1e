"""The words and small facts that the training text is made of."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana",
}  # fmt: skip

COLOURS_OF_THINGS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a ripe banana": "yellow",
    "a carrot": "orange", "a tomato": "red", "a lemon": "yellow", "a leaf": "green", "the sea": "blue",
    "milk": "white", "a strawberry": "red", "chocolate": "brown", "a raven": "black", "a flamingo": "pink",
    "the sun": "yellow", "an elephant": "grey", "a plum": "purple", "wood": "brown", "a cloud": "white",
}  # fmt: skip

MIXED_COLOURS = {
    ("blue", "yellow"): "green", ("red", "yellow"): "orange", ("red", "blue"): "purple",
    ("red", "white"): "pink", ("black", "white"): "grey",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "early": "late", "up": "down", "old": "young",
    "light": "dark", "happy": "sad", "open": "closed", "full": "empty", "loud": "quiet", "near": "far",
    "rich": "poor", "strong": "weak", "high": "low", "wet": "dry", "soft": "hard", "left": "right",
}  # fmt: skip

SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "sheep": "bleats", "duck": "quacks", "lion": "roars",
    "horse": "neighs", "bee": "buzzes", "wolf": "howls", "frog": "croaks",
}  # fmt: skip

DEFINITIONS = {
    "a cat": "A cat is a small animal with soft fur that likes to sleep in warm places.",
    "a dog": "A dog is a friendly animal that likes to run and to play with people.",
    "a river": "A river is a long stream of water that flows to the sea.",
    "a bridge": "A bridge is a road that goes over a river.",
    "a lantern": "A lantern is a lamp that you can carry in the dark.",
    "a harbor": "A harbor is a safe place where ships can rest.",
    "an orchard": "An orchard is a garden full of fruit trees.",
    "a falcon": "A falcon is a fast bird that hunts from high in the sky.",
    "a clock": "A clock is a machine that tells the time.",
    "a book": "A book is a stack of pages with words or pictures on them.",
    "a boat": "A boat is a small ship that carries people over the water.",
    "a castle": "A castle is a large house with thick walls and high towers.",
    "a garden": "A garden is a piece of land where flowers and vegetables grow.",
    "a mountain": "A mountain is a very high hill made of rock.",
    "a teacher": "A teacher is a person who helps others to learn.",
    "a baker": "A baker is a person who makes bread and cakes.",
    "a key": "A key is a small piece of metal that opens a lock.",
    "a password": "A password is a secret word that opens something.",
    "a project": "A project is a piece of work with a goal and an end.",
    "rain": "Rain is water that falls from the clouds.",
    "winter": "Winter is the coldest season of the year.",
    "summer": "Summer is the warmest season of the year.",
    "copper": "Copper is a red metal that carries heat and current well.",
    "music": "Music is sound that is put in order so that it is nice to hear.",
}

SMALL_TALK = [
    (["Hello!", "Hello", "Hi!", "Hi", "Hi there!", "Hey"], "Hello! How can I help you?"),
    (["Good morning!", "Good morning"], "Good morning! How can I help you?"),
    (["Good evening!", "Good evening"], "Good evening! How can I help you?"),
    (["How are you?", "How are you today?", "How do you do?"], "I am fine, thank you. How are you?"),
    (["Who are you?", "What are you?", "What is your name?"], "I am a small demo model of lora_serve."),
    (["Thank you!", "Thank you", "Thanks!", "Thanks a lot!"], "You are welcome."),
    (["Goodbye!", "Goodbye", "Bye", "Good night!", "See you!"], "Goodbye! Have a nice day."),
    (
        ["What can you do?", "Help", "How can you help me?"],
        "I can count, add small numbers, name colours and capitals, and tell stories.",
    ),
    (["I am sad.", "I feel sad today."], "I am sorry to hear that. Shall I tell you a story?"),
    (["I am happy.", "I feel great today!"], "That is good to hear!"),
    (["Are you a robot?", "Are you a person?"], "I am a small language model, not a person."),
    (["What is the weather like?", "Will it rain today?"],
     "I do not know the weather, because I cannot look outside."),
    (["What time is it?", "What day is it?"], "I do not know, because I have no clock."),
    (["Name the days of the week.", "What are the days of the week?"],
     "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
    (["Name the seasons.", "What are the four seasons?"], "Spring, summer, autumn and winter."),
    (["Name the months.", "What are the months of the year?"],
     "January, February, March, April, May, June, July, August, September, October, November and December."),
    (["Say the alphabet.", "What is the alphabet?"],
     "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"),
]  # fmt: skip

PROJECT_NAMES = _words("""
acorn amber anchor anvil apollo arrow aspen atlas aurora avalon badger balloon bamboo basalt beacon
birch bishop blossom boulder breeze brook buffalo cactus camel canyon carbon castle cedar cinder
citrus clover cobalt comet compass copper coral cosmos cotton crater crystal cypress daisy dawn
delta desert diamond dolphin domino dragon drum eagle echo eclipse ember emerald engine falcon
feather fern fjord flint forest fossil fountain galaxy garnet gazelle ginger glacier granite harbor
hazel helium heron hickory horizon hornet hurricane hydra indigo iris island ivory jade jaguar
jasmine jasper juniper jupiter kestrel kettle krypton lagoon lantern lavender lemon lily lotus lunar
magnet mango maple marble meadow mercury meteor midnight mirror mosaic nebula needle neon neptune
nickel nova oasis obsidian ocean olive onyx opal orbit orchid orion osprey otter oxygen panda
panther paper pearl pebble pepper phoenix pilot pine planet plasma polar poppy prism puma pyramid
quartz quasar rabbit radar radon raven reef ribbon river robin rocket rose ruby saffron sage salmon
sapphire saturn scarlet shadow sierra signal silver solar sparrow spruce star stone storm summit
sunset tango temple tiger timber titan topaz tornado trident tulip tundra turtle umbra valley vector
velvet venus violet viper vortex walnut whale willow window wolf xenon yarrow zebra zenith zephyr
zinc bastille battery basket bassoon argo argent argus arcade city citizen citron dagobert dahlia
danger
""")

SYLLABLES = _words("""
ba be bo ca co da de do fa fi ga go ha ka ki la le lo ma mi mo na no pa po ra ri ro sa si ta te to
va vi zo
""")

ANIMALS = _words("""
fox cat dog bear rabbit owl mouse hen goat hedgehog
""")
NAMES = _words("""
Anna Ben Clara David Emma Felix Greta Henry Ida Jonas Lena Max Nora Oscar Paula Tom
""")
ADJECTIVES = _words("""
little old brave clever quiet happy tired friendly curious lonely
""")
PLACES = [
    "in a green forest", "by a wide river", "in a small village", "near the sea", "on a high mountain",
    "in a warm valley", "behind an old mill", "at the edge of a town",
]  # fmt: skip
OBJECTS = [
    "a golden key", "an old map", "a broken lantern", "a small boat", "a red apple", "a silver bell",
    "a strange letter", "a heavy stone", "a blue feather", "a box of seeds",
]  # fmt: skip
WEATHER = [
    "the sun was shining",
    "it was raining",
    "the wind was strong",
    "snow was falling",
    "the sky was grey",
]
FEELINGS = ["very happy", "a little afraid", "full of hope", "very surprised", "tired but proud"]
LESSONS = [
    "that a good friend is worth more than gold", "that it is good to ask for help",
    "that small steps lead far", "that it pays to be patient", "that a shared meal tastes better",
]  # fmt: skip
