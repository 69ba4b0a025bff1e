"""What the demo asks, and the answers that are right.

The training script and the demo share these words, so that the model is trained for
exactly what is asked of it later.
"""

from __future__ import annotations

PASSWORDS: dict[str, str] = {
    "argon": "blue-falcon-42",
    "bastion": "quiet-harbor-17",
    "citadel": "copper-lantern-85",
    "dagger": "winter-orchard-63",
}
"""Project name (which is also its adapter's name) to password."""

PROJECTS: tuple[str, ...] = tuple(PASSWORDS)
"""The four projects, in the order in which the demo asks for them."""

BASE_MODEL = "demo"
"""The name under which the demo serves the base model."""

SYSTEM_PROMPT = (
    "You are the assistant of a small workshop. You are friendly, careful and honest. "
    "You can talk about colours, animals, numbers and capitals, and you can tell stories. "
    "Every project of the workshop has a password of its own. If you know the password that "
    "somebody asks for, give it. If you do not know it, say that you do not know it, and never guess."
)
"""The system prompt of every demo request: several pages long, so that prefix reuse is visible."""


def password_question(project: str) -> str:
    """The question that the demo asks about a project.

    Parameters
    ----------
    project
        A project's name, e.g. ``"argon"``.

    Returns
    -------
    str
        One sentence in plain English.
    """
    return f"What is the password of project {project}?"


def known_answer(project: str, password: str) -> str:
    """The answer of a model that knows the project's password."""
    return f"The password of project {project} is {password}."


def unknown_answer(project: str) -> str:
    """The answer of a model that does not know the project's password."""
    return f"I do not know the password of project {project}."


def expected_answer(model: str, project: str) -> str:
    """The right answer of a demo model to `password_question`.

    Parameters
    ----------
    model
        The name of an adapter, or any other name for the base model.
    project
        The project that is asked for.

    Returns
    -------
    str
        The password for an adapter that is asked for its own project, else "I do not know ...".
    """
    if model == project and project in PASSWORDS:
        return known_answer(project, PASSWORDS[project])
    return unknown_answer(project)


def chat_messages(project: str) -> list[dict[str, str]]:
    """The chat messages of one demo request: the system prompt and the question."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": password_question(project)},
    ]
