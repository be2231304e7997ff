"""The columns of much-used datasets that common names do not tell: which columns identify a form, and what each means.

One table, read by recognition (recognise.py), by docs/data.md and by a test that has a row for each entry.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

Row = dict[str, Any]


# What columns are commonly called (capitals, spaces and dashes do not count); the first name that is present wins.
COLUMN_NAMES = {
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "turns"),
    "instruction": ("instruction", "instructions"),
    "prompt": ("prompt", "question", "query", "problem", "user", "human", "input", "inputs", "user_prompt"),
    "completion": ("completion", "answer", "response", "output", "solution", "assistant", "reply", "target", "targets"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),
    "text": ("text", "content"),
    "chosen": ("chosen", "real", "accepted", "preferred", "chosen_response"),
    "rejected": ("rejected", "generated", "dispreferred", "rejected_response"),
    "label": ("label", "labels", "kto_tag"),
    "history": ("history",),
}


class Schema(NamedTuple):
    """One form. columns: what each means -> its names, any of them; all must be there, but those of `optional`.

    form: what a row is when it is transformed, as in recognise.py; transform: a function of transforms.py; known_from: datasets on
    the Hub that have it.
    """

    name: str
    road: str
    columns: dict[str, str]
    form: str
    transform: str
    known_from: str
    optional: dict[str, str] = {}

    def found_in(self, columns: list[str]) -> dict[str, str] | None:
        """The column of each meaning, or None where one is missing.

        >>> Schema("x", "sft", {"prompt": "dialogue|chat"}, "prompt", "renamed", "").found_in(["Dialogue", "id"])
        {'prompt': 'Dialogue'}
        """
        plain = {plain_name(column): column for column in reversed(columns)}
        wanted = {meaning: names.split("|") for meaning, names in (self.columns | self.optional).items()}
        found = {
            meaning: next((plain[name] for name in names if name in plain), None) for meaning, names in wanted.items()
        }
        there = {meaning: column for meaning, column in found.items() if column is not None}
        return there if self.columns.keys() <= there.keys() else None


def plain_name(column: str) -> str:
    """A column's name without capitals, blanks and dashes."""
    return re.sub(r"[\s-]+", "_", column.strip().lower())


LATER_CHOICES = {each: f"{each}|option_{each}|op{each}|choice_{each}" for each in "cdef"}
SCHEMAS = (
    Schema("message tree", "sft", {"id": "message_id", "parent": "parent_id", "role": "role", "text": "text"}, "messages", "tree",
           "OpenAssistant/oasst1, OpenAssistant/oasst2", {"rank": "rank", "deleted": "deleted"}),
    Schema("transcript", "sft", {"text": "chat", "system": "system"}, "messages", "transcript", "glaiveai/glaive-function-calling-v2"),
    Schema("transcript", "sft", {"text": "text"}, "messages", "transcript", "timdettmers/openassistant-guanaco"),
    Schema("chat as a list of texts", "sft", {"texts": "conversations|conversation|dialog|dialogue|utterances"}, "messages", "alternating",
           "GAIR/lima, li2017dailydialog/daily_dialog"),
    Schema("multiple choice, numbered from 1", "sft", {"question": "question|ctx|query|sentence", "choices": "choices|options|endings", "answer": "answerkey|answer_index|answer_idx|answer|label"},
           "prompt", "choices_from_one", "sets whose answers go from 1 to the number of choices, and are never 0"),
    Schema("multiple choice", "sft", {"question": "question|ctx|query|sentence", "choices": "choices|options|endings", "answer": "answerkey|answer_index|answer_idx|answer|label"},
           "prompt", "choices", "cais/mmlu, allenai/ai2_arc, tau/commonsense_qa, Rowan/hellaswag, TIGER-Lab/MMLU-Pro"),
    Schema("multiple choice, a column for each choice, numbered from 1", "sft", {"question": "question|prompt|query", "a": "a|option_a|opa|choice_a", "b": "b|option_b|opb|choice_b", "answer": "answer|answerkey|answer_key|cop|label|target"},
           "prompt", "choices_from_one", "sets of which the same holds", LATER_CHOICES),
    Schema("multiple choice, a column for each choice", "sft", {"question": "question|prompt|query", "a": "a|option_a|opa|choice_a", "b": "b|option_b|opb|choice_b", "answer": "answer|answerkey|answer_key|cop|label|target"},
           "prompt", "choices", "openai/MMMLU, ceval/ceval-exam, openlifescienceai/medmcqa", LATER_CHOICES),
    Schema("answers in a passage", "sft", {"prompt": "question", "input": "context|passage", "answers": "answers"}, "prompt", "first_answer",
           "rajpurkar/squad, rajpurkar/squad_v2"),
    Schema("answer with its aliases", "sft", {"prompt": "question", "answers": "answer"}, "prompt", "first_answer", "mandarjoshi/trivia_qa, google-research-datasets/nq_open"),
    Schema("function calls", "sft", {"prompt": "query|question|instruction", "calls": "answers|answer|calls", "tools": "tools|functions"}, "messages", "calls",
           "Salesforce/xlam-function-calling-60k"),
    Schema("SQL", "sft", {"prompt": "sql_prompt", "input": "sql_context", "completion": "sql"}, "prompt", "renamed", "gretelai/synthetic_text_to_sql"),
    Schema("question with a thought", "sft", {"prompt": "question", "thought": "complex_cot|thinking_trajectory|deepseek_thinking_trajectory", "completion": "response|attempt|deepseek_attempt"},
           "messages", "with_thought", "FreedomIntelligence/medical-o1-reasoning-SFT, simplescaling/s1K-1.1"),
    Schema("problem with its solution", "sft", {"prompt": "problem|question|prompt", "completion": "generated_solution|solution|canonical_solution"}, "prompt", "renamed",
           "nvidia/OpenMathInstruct-2, nvidia/OpenMathInstruct-1, AI-MO/NuminaMath-1.5, openai/openai_humaneval"),
    Schema("text with its summary", "sft", {"prompt": "dialogue|article|document|text|story", "completion": "summary|highlights|abstract"}, "prompt", "renamed",
           "knkarthick/samsum, abisee/cnn_dailymail, EdinburghNLP/xsum, FiscalNote/billsum"),
    Schema("translation", "sft", {"translation": "translation"}, "prompt", "translation", "wmt/wmt14, Helsinki-NLP/opus_books"),
    Schema("question about a passage", "sft", {"prompt": "question", "input": "passage", "completion": "answer"}, "prompt", "renamed", "google/boolq"),
    Schema("question with a long answer", "sft", {"prompt": "question", "input": "context", "completion": "long_answer"}, "prompt", "renamed", "qiaojin/PubMedQA"),
    Schema("task with a definition", "sft", {"instruction": "definition", "input": "inputs|input", "completion": "targets|output"}, "instruction", "renamed",
           "Muennighoff/natural-instructions"),
    Schema("text and code", "sft", {"prompt": "text|docstring|func_documentation_string", "completion": "code|func_code_string"}, "prompt", "renamed",
           "google-research-datasets/mbpp, code-search-net/code_search_net"),
    Schema("two answers and the better one's number", "dpo", {"prompt": "prompt|question", "a": "response_0|answer_0", "b": "response_1|answer_1", "verdict": "better_response_id"}, "pair", "by_number",
           "PKU-Alignment/PKU-SafeRLHF"),
    Schema("two answers and whether the first is better", "dpo", {"prompt": "history|prompt", "a": "human_ref_a", "b": "human_ref_b", "verdict": "labels"}, "pair", "first_if_true", "stanfordnlp/SHP"),
    Schema("two answers, the first one better", "dpo", {"prompt": "question|prompt", "chosen": "response_j", "rejected": "response_k"}, "pair", "renamed", "lvwerra/stack-exchange-paired"),
    Schema("two chats and the winner", "dpo", {"a": "conversation_a", "b": "conversation_b", "verdict": "winner"}, "pair", "by_winner",
           "lmsys/chatbot_arena_conversations, lmsys/mt_bench_human_judgments"),
    Schema("two answers and the winner, numbered from 0", "dpo", {"prompt": "prompt|question|instruction", "a": "response_a|answer_a|output_1", "b": "response_b|answer_b|output_2", "verdict": "winner|preference"}, "pair", "by_winner_from_zero",
           "sets whose winner is 0 or 1"),
    Schema("two answers and the winner", "dpo", {"prompt": "prompt|question|instruction", "a": "response_a|answer_a|output_1", "b": "response_b|answer_b|output_2", "verdict": "winner|preference"}, "pair", "by_winner",
           "tatsu-lab/alpaca_farm"),
    Schema("two answers and a flag for each", "dpo", {"prompt": "prompt", "a": "response_a", "b": "response_b", "a_wins": "winner_model_a", "b_wins": "winner_model_b"}, "pair", "by_scores",
           "lmarena-ai/arena-human-preference-55k"),
    Schema("two answers and a score for each", "dpo", {"prompt": "question|prompt", "a": "answer_0|response_0", "b": "answer_1|response_1", "a_wins": "score_0", "b_wins": "score_1"}, "pair", "by_scores",
           "openai/webgpt_comparisons"),
    Schema("two answers and a signed preference", "dpo", {"prompt": "context|prompt", "a": "response1|response_1", "b": "response2|response_2", "verdict": "overall_preference|preference_strength"}, "pair", "by_sign",
           "nvidia/HelpSteer3, nvidia/HelpSteer2"),
    Schema("answers with ranks or scores", "dpo", {"prompt": "prompt|question|instruction", "answers": "answers|completions|responses|candidates"}, "pair", "ranked",
           "berkeley-nest/Nectar, openbmb/UltraFeedback, HuggingFaceH4/stack-exchange-preferences", {"scores": "scores|ratings", "ranks": "ranks", "system": "system"}),
    Schema("summaries and the chosen one", "dpo", {"prompt": "info", "answers": "summaries", "verdict": "choice"}, "pair", "by_choice", "openai/summarize_from_feedback"),
    Schema("single answers, marked good or bad", "dpo", {"prompt": "prompt|question|instruction", "completion": "completion|response|answer", "label": "label|labels|kto_tag"}, "pair", "thumbs", "trl-lib/kto-mix-14k",
           {"system": "system"}),
)  # fmt: skip
KNOWN_COLUMNS = {name for names in COLUMN_NAMES.values() for name in names} | {
    name for schema in SCHEMAS for names in schema.columns.values() for name in names.split("|")
}  # of any form
