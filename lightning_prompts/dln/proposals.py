"""Sources of new prompts (B_pi of the paper): an LM, added examples, or rewriting rules."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_prompts.dln.cached_lm import CachedLM
from lightning_prompts.dln.messages import MESSAGES, BanditStats, CycledMessages, MessageChoice
from lightning_prompts.errors import UserError, check_at_least, check_finite, check_stop
from lightning_prompts.types import Example


@dataclass(frozen=True)
class Case:
    """An example of the batch with a layer's output.

    Attributes:
        input: Input of the layer.
        output: Output of the layer.
        target: Target of the layer.
        right: Whether the network's answer was right.
        feedback: What to say about the output; empty for whether it is right, and the target.
    """

    input: str
    output: str
    target: str
    right: bool
    feedback: str = ""


@dataclass(frozen=True)
class Proposal:
    """A prompt to try.

    Attributes:
        text: The prompt.
        parent: The prompt that the proposal changes.
        kind: Name of the class that created it.
        message: Index of the message to the proposer, if any.
    """

    text: str
    parent: str
    kind: str
    message: int | None = None


@dataclass(frozen=True)
class Request:
    """A request for proposals for a layer.

    Attributes:
        parents: The current prompt, then the prompts of the memory.
        cases: The batch.
        options: The names of the classes, if all examples have the same ones and the layer answers; else empty.
        stats: Statistics of the messages so far.
        generator: Source of all random numbers.
        proposer: The LM that writes proposals.
    """

    parents: Sequence[str]
    cases: Sequence[Case]
    options: Sequence[str]
    stats: BanditStats
    generator: torch.Generator
    proposer: CachedLM

    def shuffled(self) -> list[Case]:
        """Return the batch in a new random order."""
        order = torch.randperm(len(self.cases), generator=self.generator, device="cpu")
        return [self.cases[index] for index in order.tolist()]

    def seed(self) -> int:
        """Return a new random seed."""
        return int(torch.randint(2**62, (1,), generator=self.generator, device="cpu"))

    def in_turn(self, count: int) -> list[str]:
        """Return ``count`` parents; after the last one, the first one follows."""
        return [self.parents[index % len(self.parents)] for index in range(count)]


class Proposals(ABC):
    """A source of prompts."""

    @abstractmethod
    def propose(self, request: Request) -> list[Proposal]:
        """Propose prompts; `distinct` removes empty ones and duplicates later."""


def distinct(proposals: Sequence[Proposal], known: Sequence[str]) -> list[Proposal]:
    """Remove empty proposals, known ones, and duplicates after the first."""
    seen = {" ".join(text.split()) for text in known}
    kept = []
    for proposal in proposals:
        plain = " ".join(proposal.text.split())
        if plain and plain not in seen:
            seen.add(plain)
            kept.append(proposal)
    return kept


# --- written by an LM -------------------------------------------------------------------------------------------------

FRAME = (
    "A student answers questions by following an instruction. A teacher looks at the student's work and improves the "
    "instruction, so that the student makes fewer errors.\n\nThe instruction now:\n{prompt}\n\n"
)
SUCCESS = "Input:\n{input}\nCorrect output: {target}\n\n"
ERROR = "Input:\n{input}\nOutput of the student: {output}\nCorrect output: {target}\n\n"
ASK = "Improve the instruction, so that the student gets all of them right. {message}\nThe new instruction:"
PARAGRAPH = r"\n\s*\n"
LABEL = r"(?:the |a )?(?:(?:new |improved |combined )?instruction|variation)(?: is)?\s*:"
MARKS = re.compile(rf"^(?:[>*#\-\s\"'`]|{LABEL})+", re.IGNORECASE)


def _check_written(source: object, count: int, max_new_tokens: int, temperature: float, shown: int = 0) -> None:
    """Check the settings of a source that asks an LM.

    Raises:
        UserError: A setting is too small or not finite.
    """
    kind = type(source).__name__
    for name, value in (("count", count), ("max_new_tokens", max_new_tokens)):
        check_at_least(f"{kind}.{name}", value)
    if shown < 0:
        raise UserError(f"{kind}.shown must not be negative, got {shown}")
    check_finite(f"{kind}.temperature", temperature)


@dataclass(frozen=True)
class LanguageModelProposals(Proposals):
    """An LM rewrites an instruction in the role of a teacher; it sees correct answers and errors.

    Attributes:
        count: Number of proposals.
        temperature: Sampling temperature.
        max_new_tokens: Maximum length of an instruction, in tokens.
        held_out: Show each proposal only a random half of the batch, and score it on the whole batch.
        shown: Maximum number of examples in a question; fewer if the context window is too small.
        stop: Regular expression; an instruction ends where it first matches. A newline stops small LMs from continuing
            the pattern of the examples.
        messages: Rule that chooses the messages.
    """

    count: int = 19
    temperature: float = 0.7
    max_new_tokens: int = 64
    held_out: bool = True
    shown: int = 10
    stop: str = PARAGRAPH
    messages: MessageChoice = CycledMessages()

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_written(self, self.count, self.max_new_tokens, self.temperature, self.shown)
        check_stop(f"{type(self).__name__}.stop", self.stop)

    def propose(self, request: Request) -> list[Proposal]:
        """See `Proposals`; the proposals rewrite the parents in turn, each with the batch in a new order."""
        asked: list[Example] = []
        messages: list[int | None] = []
        parents = request.in_turn(self.count)
        for index, parent in enumerate(parents):
            message = self.messages.choose(request.stats, index, request.generator)
            cases = request.shuffled()
            if self.held_out:
                cases = cases[: (len(cases) + 1) // 2]
            write = functools.partial(self.write, parent, message)
            asked.append(fitted(request.proposer, cases[: self.shown], self.max_new_tokens, self.stop, write))
            messages.append(message)
        return _written(self, request, asked, parents, messages)

    @staticmethod
    def write(parent: str, message: int | None, cases: Sequence[Case]) -> str:
        """Write the question to the LM."""
        text = FRAME.format(prompt=parent)
        for heading, form, right in (("Done well:\n\n", SUCCESS, True), ("Errors:\n\n", ERROR, False)):
            mine = [case for case in cases if case.right == right]
            if mine:
                text += heading + "".join(
                    form.format(input=case.input, output=case.output, target=case.target) for case in mine
                )
        return text + ASK.format(message="" if message is None else MESSAGES[message])


def _written(
    source: LanguageModelProposals | Paraphrases | InducedInstructions | Reflection | Crossover,
    request: Request,
    asked: Sequence[Example],
    parents: Sequence[str],
    messages: Sequence[int | None] | None = None,
) -> list[Proposal]:
    """Let the proposer answer the questions of a source, each with the parent that it may replace."""
    seeds = [request.seed() for _ in asked]
    texts = request.proposer.draw(asked, "", source.max_new_tokens, source.temperature, seeds)
    return [
        Proposal(_instruction(text), parent, type(source).__name__, message)
        for text, parent, message in zip(texts, parents, messages or [None] * len(texts), strict=True)
    ]


def fitted(
    proposer: CachedLM, cases: Sequence[Case], room: int, stop: str, write: Callable[[Sequence[Case]], str]
) -> Example:
    """Build a question to a proposer, with as many cases as fit its context window.

    Args:
        proposer: The LM.
        cases: The cases to show, the most important first. If not all fit, cases that do not fit alone are dropped
            first, so one long example does not displace the others; then cases at the end are dropped.
        room: Number of tokens that the proposer may write.
        stop: See `Example`.
        write: Function that writes the question with some cases.

    Raises:
        UserError: The question does not fit even without cases.
    """

    def question(shown: Sequence[Case]) -> Example | None:
        example = _question(proposer, write(shown), stop)
        return example if proposer.lm.length(example) + room <= proposer.lm.context else None

    if whole := question(cases):
        return whole
    short = [case for case in cases if question([case])]
    for count in range(len(short), -1, -1):
        if part := question(short[:count]):
            return part
    raise UserError(
        f"the context window of {proposer.lm.name} ({proposer.lm.context}) is too small for a question to the proposer "
        f"and {room} new tokens; take another proposer, or RuleRewrites or MinedExamples"
    )


def _question(proposer: CachedLM, text: str, stop: str) -> Example:
    """Return a question, as a chat if the proposer supports chats."""
    return Example(before=text, after="", answer=None, stop=stop, chat=proposer.lm.chats, source="proposal")


def _instruction(text: str) -> str:
    """Extract the instruction from the proposer's text."""
    return MARKS.sub("", text).strip().strip("\"'`*").strip()


@dataclass(frozen=True)
class Paraphrases(Proposals):
    """An LM paraphrases an instruction (the resampling of APE, Zhou et al. 2023, section 3.3).

    Attributes:
        count: Number of proposals.
        temperature: Sampling temperature.
        max_new_tokens: Maximum length of an instruction, in tokens.
    """

    count: int = 8
    temperature: float = 0.7
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_written(self, self.count, self.max_new_tokens, self.temperature)

    def propose(self, request: Request) -> list[Proposal]:
        """See `Proposals`."""
        parents = request.in_turn(self.count)
        ask = "Write a variation of the following instruction, keeping its meaning.\n\nInstruction: {}\n\nVariation:"
        asked = [_question(request.proposer, ask.format(parent), PARAGRAPH) for parent in parents]
        return _written(self, request, asked, parents)


@dataclass(frozen=True)
class InducedInstructions(Proposals):
    """An LM guesses the instruction from inputs and outputs alone (APE's forward mode, Zhou et al. 2023, section 3.1).

    Attributes:
        count: Number of proposals.
        shown: Number of examples in each question; fewer if the context window is too small.
        temperature: Sampling temperature.
        max_new_tokens: Maximum length of an instruction, in tokens.
    """

    count: int = 15
    shown: int = 5
    temperature: float = 0.7
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_written(self, self.count, self.max_new_tokens, self.temperature, self.shown)

    def propose(self, request: Request) -> list[Proposal]:
        """See `Proposals`."""
        asked = []
        for _ in range(self.count):
            cases = request.shuffled()[: self.shown]
            question = fitted(request.proposer, cases, self.max_new_tokens, PARAGRAPH, self.write)
            asked.append(question)
        return _written(self, request, asked, [request.parents[0]] * self.count)

    @staticmethod
    def write(cases: Sequence[Case]) -> str:
        """Write the question to the LM."""
        pairs = "".join(SUCCESS.format(input=case.input, target=case.target) for case in cases)
        return (
            "I gave a friend an instruction. Following it, the friend read each input and wrote its output:"
            f"\n\n{pairs}What was the instruction?\nThe instruction:"
        )


def verdict(what: str, right: bool, target: str) -> str:
    """Say in words whether an answer is right, and which one is."""
    return f"{what} is right." if right else f"{what} is wrong. The right answer is: {target}"


@dataclass(frozen=True)
class Reflection(Proposals):
    r"""An LM reads what an instruction led to, with feedback in words, and rewrites it (GEPA, arXiv 2507.19457).

    Errors come first. The question asks for the rules and facts that the instruction lacks.

    Attributes:
        count: Number of proposals; the paper makes one.
        temperature: Sampling temperature.
        max_new_tokens: Maximum length of an instruction, in tokens.
        shown: Maximum number of examples in a question; fewer if the context window is too small.
        stop: Regular expression; an instruction ends where it first matches. ``\Z`` allows several paragraphs.
    """

    count: int = 1
    temperature: float = 0.7
    max_new_tokens: int = 128
    shown: int = 10
    stop: str = PARAGRAPH

    TASK = (
        "An assistant follows an instruction. Read what it did and the feedback, and write a better instruction.\n\n"
        "The instruction now:\n{prompt}\n\nWhat the assistant did:\n\n"
    )
    CASE = "Input:\n{input}\nOutput: {output}\nFeedback: {feedback}\n\n"
    ASK = (
        "Find out what the task is, and which rules and facts the instruction lacks. Write an instruction that also "
        "holds for other inputs, without repeating these.\nThe new instruction:"
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_written(self, self.count, self.max_new_tokens, self.temperature, self.shown)
        check_stop(f"{type(self).__name__}.stop", self.stop)

    def propose(self, request: Request) -> list[Proposal]:
        """See `Proposals`; the proposals rewrite the parents in turn, each with the batch in a new order."""
        parents = request.in_turn(self.count)
        asked = []
        for parent in parents:
            cases = sorted(request.shuffled(), key=lambda case: case.right)[: self.shown]
            write = functools.partial(self.write, parent)
            asked.append(fitted(request.proposer, cases, self.max_new_tokens, self.stop, write))
        return _written(self, request, asked, parents)

    @classmethod
    def write(cls, parent: str, cases: Sequence[Case]) -> str:
        """Write the question to the LM."""
        shown = "".join(
            cls.CASE.format(
                input=case.input,
                output=case.output,
                feedback=case.feedback or verdict("This", case.right, case.target),
            )
            for case in cases
        )
        return cls.TASK.format(prompt=parent) + shown + cls.ASK


@dataclass(frozen=True)
class Crossover:
    """An LM combines two instructions into one (CAPO, arXiv 2504.16005, section 3).

    It is no source of `Proposals`, because it needs pairs of parents.

    Attributes:
        count: Number of pairs of parents, and of proposals.
        temperature: Sampling temperature.
        max_new_tokens: Maximum length of an instruction, in tokens.
    """

    count: int = 4
    temperature: float = 0.7
    max_new_tokens: int = 64

    ASK = (
        "Here are two instructions for the same task. Combine the best of both into one instruction.\n\n"
        "First instruction: {}\n\nSecond instruction: {}\n\nCombined instruction:"
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_written(self, self.count, self.max_new_tokens, self.temperature)

    def propose(self, request: Request) -> list[Proposal]:
        """Propose an instruction for each pair of parents, which stand one after the other."""
        pairs = list(zip(request.parents[::2], request.parents[1::2], strict=True))
        asked = [_question(request.proposer, self.ASK.format(*pair), PARAGRAPH) for pair in pairs]
        return _written(self, request, asked, [pair[0] for pair in pairs])


# --- without an LM ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MinedExamples(Proposals):
    """Adds worked examples of the batch to an instruction; they replace those of an earlier step.

    Attributes:
        count: Number of proposals.
        shots: Maximum number of examples in each, at least 1.
        errors_first: Take examples with wrong answers first.
    """

    count: int = 4
    shots: int = 2
    errors_first: bool = False

    HEADING = "\n\nFor example:\n"

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("count", "shots"):
            check_at_least(f"MinedExamples.{name}", getattr(self, name))

    def propose(self, request: Request) -> list[Proposal]:
        """See `Proposals`."""
        proposals = []
        for parent in request.in_turn(self.count):
            cases = request.shuffled()
            if self.errors_first:
                cases.sort(key=lambda case: case.right)
            shots = 1 + int(torch.randint(self.shots, (1,), generator=request.generator, device="cpu"))
            worked = "\n\n".join(f"{case.input}\nAnswer: {case.target}" for case in cases[:shots])
            text = parent.partition(self.HEADING)[0] + self.HEADING + worked
            proposals.append(Proposal(text, parent, type(self).__name__))
        return proposals


@dataclass(frozen=True)
class RuleRewrites(Proposals):
    """Rewrites an instruction by rules: add, drop or reorder sentences, or name the options.

    Attributes:
        count: Number of proposals.
    """

    count: int = 4

    ADDED = (
        "Think carefully before you answer.",
        "Look at every word.",
        "Compare the options with each other.",
        "Answer with one word.",
        "Do not guess.",
        "Be exact.",
        "Read the whole input first.",
    )
    OPENINGS = ("Question: ", "Task: ", "Instruction: ", "You are an expert. ", "Please answer: ")

    def __post_init__(self) -> None:
        """Check the setting."""
        check_at_least("RuleRewrites.count", self.count)

    def propose(self, request: Request) -> list[Proposal]:
        """See `Proposals`; return a random choice of the rewrites of all parents by all rules."""
        known = set(request.parents)
        made = [
            Proposal(text, parent, type(self).__name__)
            for parent in request.parents
            for text in self.rewrites(parent, request.options)
        ]
        made = list({proposal.text: proposal for proposal in made if proposal.text not in known}.values())
        order = torch.randperm(len(made), generator=request.generator, device="cpu").tolist()
        return [made[index] for index in order[: self.count]]

    def rewrites(self, prompt: str, options: Sequence[str]) -> list[str]:
        """Return all rewrites of a prompt."""
        body, heading, examples = prompt.partition(MinedExamples.HEADING)
        sentences = re.split(r"(?<=[.!?:])\s+", body.strip())
        texts = [f"{body} {sentence}".strip() for sentence in self.ADDED if sentence not in body]
        texts += [opening + body for opening in self.OPENINGS if body and not body.startswith(self.OPENINGS)]
        if len(sentences) > 1:
            texts += [" ".join(sentences[:k] + sentences[k + 1 :]) for k in range(len(sentences))]
            texts.append(" ".join(reversed(sentences)))
        if options and "Answer with " not in body:
            for names in (options, list(reversed(options))):
                texts.append(f"{body} Answer with {', '.join(names[:-1])} or {names[-1]}.".strip())
        return [text + heading + examples for text in texts] + ([body] if heading else [])
