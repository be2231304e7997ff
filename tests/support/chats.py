"""Chats, and chat templates with the structure of well-known models."""

from autosloth.models.template import named_template, without_thinking
from autosloth.settings import SFTSettings

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
SETTINGS = SFTSettings(model="demo", max_length=1024)

# Chat templates with the structure of well-known models, in our own words: where headers stand, what ends a turn, what is refused.
HEADERS = "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|over|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
CHATML = "{% for m in messages %}{{ '<|open|>' + m.role + '\n' + m.content + '<|over|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% endif %}"
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|open|>system\nBe of use.<|over|>\n' }}{% endif %}" + CHATML
)
# As Qwen3: thinking is shown in the last answer only, though the prompt does not open it, unless it is switched off.
THINKING = "{% for m in messages %}{% set thought = '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '' %}{{ '<|open|>' + m.role + '\n' + thought + m.content + '<|over|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
NO_SYSTEM = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}{% for m in messages %}{{ '<|open|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|over|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|open|>model\n' }}{% endif %}"
INST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('roles!') }}{% endif %}{% endfor %}"
TEMPLATES = {
    "Llama 3": (HEADERS, "<|over|>"),
    "Qwen 2": (WITH_DEFAULT_SYSTEM, "<|over|>"),
    "Qwen 3": (THINKING, "<|over|>"),
    "Qwen 3, thinking off": (without_thinking(THINKING), "<|over|>"),
    "ChatML": (CHATML, "<|over|>"),
    "Gemma": (NO_SYSTEM, "<|over|>"),
    "Mistral": (INST, "</s>"),
    "our mistral": (named_template("mistral"), "</s>"),
    "Zephyr": (named_template("zephyr"), "</s>"),
    "Alpaca": (named_template("alpaca"), "</s>"),
}
MARKS = ["<|begin|>", "<|head|>", "<|/head|>", "<|open|>", "<|over|>"]


def chat(*said):
    roles = {"u": USER, "a": ASSISTANT, "s": SYSTEM, "t": TOOL}
    return {"messages": [{"role": roles[each[0]], "content": each[2:]} for each in said]}


CHATS = {
    "one turn": chat("u:What does Mila eat?", "a:Figs, I think."),
    "several turns": chat("u:One?", "a:Uno.", "u:Two?", "a:Dos.\nAnd done.", "u:Zwölf? 十二?", "a:Doce 😀 (十二)."),
    "system prompt": chat("s:Answer briefly.", "u:One?", "a:Uno.", "u:Two?", "a:Dos."),
    "the answer stands in the question": chat("u:Say Uno.", "a:Uno.", "u:Uno.?", "a:Uno."),
}
