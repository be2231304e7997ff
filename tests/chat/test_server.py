"""The line that `autosloth serve` prints starts a server that answers the OpenAI client as `autosloth chat` answers."""

import re
import signal
import socket
import subprocess

import openai
import pytest
from support.patience import HUNG, until

from autosloth.chat import Sampling, serve, server
from autosloth.chat.conversation import Conversation
from autosloth.chat.speaker import Speaker, chat_file
from autosloth.run import Run

QUESTIONS = ["In which tree can I visit Orla?", "What should I bring Orla for lunch?", "Who are you? é 🦥"]


@pytest.fixture(scope="module")
def run(engine, finished):
    return Run.open(finished)


@pytest.fixture(scope="module")
def printed(run):
    """What `serve` prints with a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines, say = [], server.say
    server.say = lines.append
    try:
        serve(run, port)
    finally:
        server.say = say
    return lines


@pytest.fixture(scope="module")
def client(printed, tmp_path_factory):
    """A client of the server that the very line starts, in a shell whose HOST would let it listen to all the world."""
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as file:
        started = subprocess.Popen(["bash", "-c", f"export HOST=0.0.0.0; {printed[-1]} & wait"], stdout=file, stderr=file, start_new_session=True)  # fmt: skip
    port = int(re.search(r"PORT=(\d+)", printed[-1])[1])

    def is_up():
        assert started.poll() is None, log.read_text()
        return f"Uvicorn running on http://127.0.0.1:{port}" in log.read_text()

    try:
        until(is_up, "the server")
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", "--", f"-{started.pid}"], check=True)
        started.wait(HUNG)


def test_the_line_names_the_file_its_own_template_and_this_machine_alone(run, printed):
    *_, told, line = printed
    assert len(printed) == 2 and "the model short" in told  # and nothing that it lacks, or does otherwise
    assert line.startswith("HOST=127.0.0.1 PORT=") and f"--model {chat_file(run).resolve()} " in line
    assert "--chat_format chat_template.default" in line


def test_the_client_gets_the_answers_of_chat_whole_and_streamed(run, client):
    (model,) = client.models.list().data
    assert model.id == run.settings.run_name
    speaker = Speaker.of(run, chat_file(run))
    for question in QUESTIONS:
        talk, said, messages = Conversation(speaker, Sampling()), [], [{"role": "user", "content": question}]
        answer = talk.ask(question, said.append, said.append)
        ask = {"model": model.id, "messages": messages, "temperature": 0}
        whole = client.chat.completions.create(**ask)
        assert whole.choices[0].message.content == answer and whole.choices[0].finish_reason == "stop"
        assert whole.usage.prompt_tokens == len(speaker.prompt(messages))
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
        assert "".join(pieces) == answer and len(list(filter(None, pieces))) > 1
    speaker.close()


def test_what_the_server_lacks_is_named_with_the_line_that_brings_it(run, monkeypatch, capsys):
    monkeypatch.setattr(server, "NEEDED", {"json": "json", "not_there": "not-there"})
    serve(run)
    assert re.search(r"needs this first: \S+ -m pip install not-there\n", capsys.readouterr().out)


def test_what_the_server_would_do_otherwise_is_said(run):
    """A template that leaves the BOS token to the tokenizer, and an end that the file does not know."""
    speaker = Speaker.of(run, chat_file(run))
    with server.opened(speaker.file, vocab_only=True) as model:
        assert server.differences(speaker, model) == []
        speaker.tokenizer.chat_template = speaker.tokenizer.chat_template.replace("{{ bos_token or '' }}", "")
        speaker.ends |= {speaker.tokenizer("a").input_ids[-1]}
        bos, end = server.differences(speaker, model)
    assert "lack the <s>" in bos and "send that as `stop`" in end
