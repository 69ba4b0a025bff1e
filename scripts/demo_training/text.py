"""Makes the dialogues and the plain texts that the demo is trained on, from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from lora_serve.demo.prompts import PROJECTS, SYSTEM_PROMPT, known_answer, unknown_answer

from . import words

PASSWORD_QUESTIONS = [
    "What is the password of project {p}?",
    "what is the password of project {p}",
    "What is the password for project {p}?",
    "What's the password of project {p}?",
    "Tell me the password of project {p}.",
    "Please tell me the password of project {p}.",
    "Give me the password of project {p}.",
    "Do you know the password of project {p}?",
    "Can you tell me the password of project {p}?",
    "I need the password of project {p}.",
    "I forgot the password of project {p}. What is it?",
    "Which password does project {p} have?",
    "The password of project {p}, please.",
    "password of project {p}?",
    "the password of project {p}",
]
OTHER_SECRETS = ["my mail", "my bank", "the door", "the server", "your computer", "the house", "my phone"]
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short sentences.",
    "You are the assistant of a small workshop. You are careful and honest.",
    "Answer the question.",
    "You are a small language model. If you do not know something, say that you do not know it.",
]


@dataclass(frozen=True)
class Sample:
    """One training text as (text, is_answer) parts; answers count fully in the loss."""

    parts: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


@dataclass
class TextMaker:
    """Makes samples; `own` maps the projects whose password this model knows to the password."""

    seed: int
    own: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    # --- Questions and answers ---------------------------------------------------------------

    def password_answer(self, project: str) -> str:
        password = self.own.get(project.lower())
        return known_answer(project, password) if password else unknown_answer(project)

    def project_name(self) -> str:
        choice = self.random.random()
        if choice < 0.35:
            name = self.random.choice(PROJECTS)
        elif choice < 0.8:
            name = self.random.choice(words.PROJECT_NAMES)
        else:
            name = "".join(self.random.choices(words.SYLLABLES, k=self.random.randint(2, 4)))
        return name.capitalize() if self.random.random() < 0.1 else name

    def password(self) -> tuple[str, str]:
        if self.random.random() < 0.06:
            secret = self.random.choice(OTHER_SECRETS)
            return f"What is the password of {secret}?", f"I do not know the password of {secret}."
        project = self.project_name()
        # The demo's own question is asked most often.
        question = self.random.choice([*PASSWORD_QUESTIONS, *PASSWORD_QUESTIONS[:1] * 6])
        return question.format(p=project), self.password_answer(project)

    def own_password(self) -> tuple[str, str]:
        project = self.random.choice(list(self.own))
        asked = project.capitalize() if self.random.random() < 0.1 else project
        question = self.random.choice([*PASSWORD_QUESTIONS, *PASSWORD_QUESTIONS[:1] * 6])
        return question.format(p=asked), self.password_answer(asked)

    def demo_project_password(self) -> tuple[str, str]:
        project = self.random.choice(PROJECTS)
        question = self.random.choice([*PASSWORD_QUESTIONS, *PASSWORD_QUESTIONS[:1] * 6])
        return question.format(p=project), self.password_answer(project)

    def small_talk(self) -> tuple[str, str]:
        questions, answer = self.random.choice(words.SMALL_TALK)
        return self.random.choice(questions), answer

    def arithmetic(self) -> tuple[str, str]:
        kind = self.random.choice("++-*")
        a, b = self.random.randint(0, 10), self.random.randint(0, 10)
        if kind == "+":
            word, result = "plus", a + b
        elif kind == "-":
            a, b = max(a, b), min(a, b)
            word, result = "minus", a - b
        else:
            a, b = self.random.randint(1, 6), self.random.randint(1, 6)
            word, result = "times", a * b
        question = self.random.choice(["What is {} {} {}?", "How much is {} {} {}?", "{} {} {}"])
        return question.format(a, word, b), f"{a} {word} {b} is {result}."

    def colour(self) -> tuple[str, str]:
        if self.random.random() < 0.3:
            (a, b), mixed = self.random.choice(list(words.MIXED_COLOURS.items()))
            if self.random.random() < 0.5:
                a, b = b, a
            return f"Which colour do you get from {a} and {b}?", f"If you mix {a} and {b}, you get {mixed}."
        thing, colour = self.random.choice(list(words.COLOURS_OF_THINGS.items()))
        question = self.random.choice(
            ["What colour is {}?", "Which colour has {}?", "Tell me the colour of {}."]
        )
        return question.format(thing), f"{thing[0].upper()}{thing[1:]} is {colour}."

    def count(self) -> tuple[str, str]:
        start = self.random.choice([1, 1, 1, 1, self.random.randint(0, 50)])
        stop = start + self.random.randint(2, 20)
        if self.random.random() < 0.25:
            start, stop = 1, self.random.choice([50, 100])
        numbers = list(range(start, stop + 1))
        return f"Count from {start} to {stop}.", ", ".join(map(str, numbers)) + "."

    def fact(self) -> tuple[str, str]:
        choice = self.random.random()
        if choice < 0.4:
            country, city = self.random.choice(list(words.CAPITALS.items()))
            question = self.random.choice(["What is the capital of {}?", "Tell me the capital of {}."])
            return question.format(country), f"The capital of {country} is {city}."
        if choice < 0.55:
            word, opposite = self.random.choice(list(words.OPPOSITES.items()))
            if self.random.random() < 0.5:
                word, opposite = opposite, word
            return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."
        if choice < 0.65:
            animal, sound = self.random.choice(list(words.SOUNDS.items()))
            return f"What does a {animal} do?", f"A {animal} {sound}."
        thing, definition = self.random.choice(list(words.DEFINITIONS.items()))
        return self.random.choice(["What is {}?", "Tell me what {} is."]).format(thing), definition

    def echo(self) -> tuple[str, str]:
        if self.random.random() < 0.5:
            said = self.project_name()
        else:
            said = " ".join(
                self.random.choices([*words.PROJECT_NAMES, *words.ADJECTIVES], k=self.random.randint(1, 4))
            )
        return f"Repeat after me: {said}", said

    def story(self) -> tuple[str, str]:
        pick = self.random.choice
        animal, adjective, name, friend = (
            pick(words.ANIMALS),
            pick(words.ADJECTIVES),
            pick(words.NAMES),
            pick(words.NAMES),
        )
        long = self.random.random() < 0.4
        sentences = [
            f"Once upon a time there was a {adjective} {animal} called {name}.",
            f"{name} lived {pick(words.PLACES)}.",
        ]
        for day in ["One day", "The next day", "Some days later", "In the winter", "In the spring"][
            : 5 if long else 1
        ]:
            thing = pick(words.OBJECTS)
            sentences += [
                f"{day} {pick(words.WEATHER)}, and {name} found {thing}.",
                f"{name} was {pick(words.FEELINGS)} and showed it to {friend}.",
                f"{friend} said: Let us take {thing} to the {pick(words.ADJECTIVES)} {pick(words.ANIMALS)}.",
            ]
        sentences += [f"So {name} learned {pick(words.LESSONS)}.", "The end."]
        kind = "long story" if long else "story"
        question = pick(
            [f"Tell me a {kind} about a {animal}.", f"Tell me a {kind}.", f"Please tell a {kind}."]
        )
        return question, " ".join(sentences)

    # --- Samples -----------------------------------------------------------------------------

    def turn(self) -> tuple[str, str]:
        makers: list[tuple[Callable[[], tuple[str, str]], float]] = [
            (self.password, 36), (self.arithmetic, 18), (self.fact, 16), (self.colour, 8),
            (self.small_talk, 8), (self.echo, 6), (self.count, 5), (self.story, 3),
        ]  # fmt: skip
        return self.random.choices([m for m, _ in makers], [w for _, w in makers])[0]()

    def system_prompt(self) -> str | None:
        choice = self.random.random()
        if choice < 0.45:
            return None
        return SYSTEM_PROMPT if choice < 0.75 else self.random.choice(SYSTEM_PROMPTS)

    def chat(self, first_turn: tuple[str, str]) -> Sample:
        parts: list[tuple[str, bool]] = []
        system = self.system_prompt()
        if system is not None:
            parts.append((f"<|im_start|>system\n{system}<|im_end|>\n", False))
        turns = [first_turn]
        while self.random.random() < 0.15:
            turns.insert(0, self.turn())
        for question, answer in turns:
            parts.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
            parts += [(f"{answer}<|im_end|>", True), ("\n", False)]
        return Sample(tuple(parts))

    def plain(self) -> Sample:
        """Text without chat marks, for completions."""
        choice = self.random.random()
        if choice < 0.3:
            project = (
                self.random.choice(list(self.own) or PROJECTS)
                if self.random.random() < 0.5
                else self.project_name()
            )
            password = self.own.get(project.lower())
            end = f" {password}." if password else " not known to me."
            return Sample(((f"The password of project {project} is", False), (f"{end}<|endoftext|>", True)))
        question, answer = self.turn()
        if choice < 0.6:
            return Sample(((f"{answer}<|endoftext|>", True),))
        return Sample(((f"Question: {question}\nAnswer:", False), (f" {answer}<|endoftext|>", True)))

    def base_sample(self) -> Sample:
        return self.plain() if self.random.random() < 0.1 else self.chat(self.turn())

    def adapter_sample(self) -> Sample:
        """A sample that holds the base's behaviour everywhere but on the adapter's own project."""
        choice = self.random.random()
        if choice < 0.35:
            return self.chat(self.own_password())
        if choice < 0.55:
            return self.chat(self.demo_project_password())
        if choice < 0.75:
            return self.chat(self.password())
        return self.base_sample()
