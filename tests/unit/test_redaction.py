"""Secrets are found by name, shape and value; what is none stays."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.parse
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distloop.config import secrets as redaction
from distloop.config.comparison import training_hash
from distloop.config.load import config_from_mapping, dump_without_secrets, load_config
from distloop.config.named_secrets import secrecy
from distloop.config.secrets import clean_command, clean_mapping, clean_text, masked_keys, remember_secrets, unmask
from distloop.config.settings import Config
from distloop.config.yaml_text import parse_yaml
from distloop.errors import UsageError
from tests.tools.ranks import command

HEX_40 = "0123456789abcdef0123456789abcdef01234567"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
PEM = "-----BEGIN RSA PRIVATE KEY-----\n+MIIEowIBAAKCAQEA\n+q83vEjN\n+-----END RSA PRIVATE KEY-----"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_remembered", set())


SECRET_NAMES = """key api_key apiKey APIKey API-KEY MY_API_KEY OPENAIAPIKEY data.args.token hfToken HF_TOKEN GITHUBTOKEN
secret AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID client.secret password db-password PGPASSWORD passwd MYSQL_PWD passphrase
credential credentials auth proxy_auth Authorization private api_keys key2 SLURM_JWT smtp_pass"""
OTHER_NAMES = """tokenizer monkey keypoints max_tokens num_keys author keyboard tokens keys secretary compass KeyError
pad_token eos_token label_key key_file TOKEN_PATH token_type authority SSH_AUTH_SOCK lr passes hidden"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_a_secret_is_known_by_the_words_of_its_name(name: str) -> None:
    assert secrecy(name)


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_what_only_has_its_letters_is_no_secret(name: str) -> None:
    assert secrecy(name) is None


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-4fKq0W3xT9bLmZ",
        "hf_AbCdEfGhIjKlMnOpQrStUvWx12",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "gho_16C7e42F292c6912E7710c838347Ae178B4a",
        "github_pat_11ABCDEFG0_abcdefghijk",
        "glpat-x2Yz7abcdEFGHijkl",
        "xoxb-123456789012-abcdefABCDEF",
        "AKIAIOSFODNN7EXAMPLE",
        "ya29.a0AfH6SMBxyz-123",
        "wandb_v1_abcdefGHIJ0123456789",
        HEX_40,
        JWT,
        PEM,
    ],
)
def test_a_secret_is_known_by_its_shape(secret: str) -> None:
    for before, after in (("", ""), ("see ", " there"), ("'", "'"), ("(", ")"), ("=", ","), ("\n", "\n")):
        assert clean_text(f"{before}{secret}{after}", {}) == f"{before}***{after}"
    assert clean_mapping({"values": [secret]}, environ={}) == {"values": ["***"]}


def test_the_rest_of_an_unclosed_private_key_is_masked() -> None:
    assert clean_text(PEM.partition("-----END")[0], {}) == "***"


@pytest.mark.parametrize(
    "text",
    [
        "task-force-number-12345 and disk-0123456789ab",
        "hf_tokenizers:make hf_transformers",
        "https://host:8080/path/user@v1 ssh://git@github.com/x/y.git",
        "KeyError: 'label'",
        "max_tokens: 2048, num_keys=12345678901, tokenizer: gpt2, author: Ada, monkey: George",
        "token: 3, key=None, auth: true, key: str, sorted(rows, key=lambda row: row[0])",
        "    key = self.project_key(x)",
        "the key is under the mat; a token of thanks",
        "steps --epochs 3 --keypoints 17",
        "import token  # noqa",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert clean_text(text, {}) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@word@host:80/x", "https://***@host:80/x"),
        ("git+https://0123456789abcdef@host", "git+https://***@host"),
        ("https://host/file?token=abc", "https://host/file?token=***"),
        ("https://host/file?a=1&sig=a%2Fb&x=2", "https://host/file?a=1&sig=***&x=2"),
        ("Authorization: Bearer abc", "Authorization: ***"),
        ("sent 'Authorization: Basic YTpi' to", "sent 'Authorization: ***' to"),
        ("curl -H bearer abcdefgh12", "curl -H bearer ***"),
        ("a {token: abc, size: 3}", "a {token: ***, size: 3}"),
        ("{'token': 'a b', 'size': 3}", "{'token': '***', 'size': 3}"),
        ('{"a": {"api_key": "a\\"b"}}', '{"a": {"api_key": "***"}}'),
        (r'"source": ["token = \"a b\""]', r'"source": ["token = \"***\""]'),
        ("run --data.args.token abc --lr 0.1", "run --data.args.token *** --lr 0.1"),
        ("run --data.args.token=abc --lr 0.1", "run --data.args.token=*** --lr 0.1"),
        ("['run', '--token', 'abc', 'x']", "['run', '--token', '***', 'x']"),
        ("see password: 1234, key: 1234, key: 12345678", "see password: ***, key: 1234, key: ***"),
        ("f(password=ab,cd, x=1)", "f(password=***, x=1)"),
        ("f(token='a' + 'b', x=1)", "f(token='***', x=1)"),
        ("def f(token: str = 'abc', n: int = 3)", "def f(token: str = '***', n: int = 3)"),
        ("os.environ['TOKEN'] = 'abc'", "os.environ['TOKEN'] = '***'"),
        ("if token == 'abc':", "if token == '***':"),
        ("    key = decode('abc')", "    key = ***"),
        ("+password: a, b and c", "+password: ***"),
        ("-export MY_SECRET=a b", "-export MY_SECRET=***"),
        ("password: |\n  a\n\n  b\nsize: 3", "password: |\n  ***\n\n  ***\nsize: 3"),
        ("+  token = (\n+    'abc'\n+  )", "+  token = (\n+    ***\n+  )"),
        ('token = """a\nb""" + c\nx', 'token = ***\n***"""***\nx'),
        ("token = 'abc", "token = ***"),
        ("token = ''", "token = ''"),
    ],
)
def test_the_value_beside_a_secret_name_is_masked_and_the_rest_stays(text: str, shown: str) -> None:
    assert clean_text(text, {}) == shown
    assert clean_text(shown, {}) == shown


@given(st.text(st.sampled_from("ab1 :='\"\\,{}()-+_.\n*key/@"), max_size=60).map(lambda text: f"token{text}password=z"))
@settings(max_examples=300, deadline=None)
def test_what_follows_the_last_equals_sign_never_gets_through(text: str) -> None:
    assert "sw=z" not in clean_text(text, {})
    assert "=z" not in clean_text(text, {})


def test_values_of_the_environment_are_masked_wherever_they_are() -> None:
    environ = {"MY_TOKEN": "a'b/c d\"e", "DB_PASSWORD": "12345678", "SOME_KEY": "short", "PLAIN": "plain-value"}
    environ |= {"PWD": "/home/someone", "KEY_FILE": "/home/someone/key", "PRIVATE_KEY": "first line\nsecond line"}
    value = environ["MY_TOKEN"]
    for form in (value, urllib.parse.quote(value, safe=""), repr(value)[1:-1], json.dumps(value)[1:-1]):
        assert clean_text(f"x{form}y", environ) == "x***y"
    assert (
        clean_text("12345678 short plain-value /home/someone/key", environ) == "*** short plain-value /home/someone/key"
    )
    assert clean_text("+first line\n+second line", environ) == "+***\n+***"
    assert clean_mapping({"data": {"root": "s3://12345678/x"}}, environ=environ) == {"data": {"root": "s3://***/x"}}


def test_secrets_of_the_settings_are_masked_wherever_they_are_once_they_are_remembered() -> None:
    text = "no access for planted-token, 87654321, filename, short1"
    assert clean_text(text, {}) == text
    args = {"token": "planted-token", "password": 87654321, "key": "filename", "auth": ["short1"]}
    remember_secrets({"data": {"args": args}})
    assert clean_text(text, {}) == "no access for ***, ***, filename, short1"


def test_commits_stay_where_they_are_expected() -> None:
    assert clean_text(f"commit {HEX_40}", {}, commits=True) == f"commit {HEX_40}"
    assert clean_mapping({"revision": HEX_40, "x": HEX_40}, environ={}) == {"revision": HEX_40, "x": "***"}


def test_settings_are_masked_by_their_keys() -> None:
    given = {
        "name": "run",
        "data": {
            "name": "auth:load",
            "args": {
                "token": "abc",
                "auth": {"user": "bob", "type": "basic"},
                "api_keys": ["a", "b"],
                "password": 1234,
                "key": 3,
                "secret": None,
                "private": True,
                "dsn": "host=h password=abc",
                "sizes": (1, 2.5),
            },
        },
    }
    shown: dict[str, Any] = clean_mapping(given, environ={})
    assert shown["name"] == "run"
    assert shown["data"]["name"] == "auth:load"
    assert shown["data"]["args"] == {
        "token": "***",
        "auth": {"user": "***", "type": "basic"},
        "api_keys": ["***", "***"],
        "password": "***",
        "key": 3,
        "secret": None,
        "private": True,
        "dsn": "host=h password=***",
        "sizes": (1, 2.5),
    }
    assert given["data"]["args"]["token"] == "abc"  # type: ignore[index]


def test_a_command_line_is_masked_in_all_forms() -> None:
    line = "train.py --data.args.token {} --data.args.api-key={} --lr 0.1 --model.args.key 3"
    words = line.format("AAA", "BBB").split()
    words += ["--data.args", "{token: CCC, size: 3, inner: {password: 444}}", "--task.args={secret: DDD}"]
    words += ["--data.args", "token: EEE", "--data.args", "{token: FFF", "--data.name", "auth:load", "--token", "-GGG"]
    words += ["--url", "https://me:HHH@host", "--x", "value-of-env", "--model.args", "{a: 1,  b: 2}"]
    shown = clean_command(words, {"MY_KEY": "value-of-env"})
    assert shown[:8] == line.format("***", "***").split()
    assert not [part for part in (*(3 * letter for letter in "ABCDEFGH"), "444", "value-of-env") if part in str(shown)]
    assert parse_yaml(shown[9]) == {"token": "***", "size": 3, "inner": {"password": "***"}}
    assert shown[-1] == "{a: 1,  b: 2}"
    assert "auth:load" in shown


def test_a_masked_value_takes_what_is_given_now_and_nothing_else_does() -> None:
    old = {"token": "***", "size": 3, "url": "https://***@host/a", "list": ["***", "x"], "gone": "***"}
    new = {"token": 12, "size": 4, "url": "https://u:p@host/a", "list": ["y", "z"]}
    assert unmask(old, new) == {"token": 12, "size": 3, "url": new["url"], "list": ["y", "x"], "gone": "***"}
    assert unmask({"url": "https://***@host/a"}, {"url": "https://u:p@host/b"}) == {"url": "https://***@host/a"}
    assert unmask("a***b***c", "a1b2c") == "a1b2c"
    assert unmask("a***b***c", "a1c") == "a***b***c"
    assert list(masked_keys(old)) == ["token", "url", "list", "gone"]


def config_with(token: str) -> Config:
    return config_from_mapping({"data": {"name": "mine:make", "args": {"token": token, "size": 3}}}, "test")


def test_another_token_is_the_same_training_and_its_copy_does_not_hold_it() -> None:
    assert training_hash(config_with("abc")) == training_hash(config_with("xyz"))
    settings = parse_yaml(dump_without_secrets(config_with("abc")))
    assert settings["data"]["args"] == {"token": "***", "size": 3}


def test_a_copy_without_its_secrets_is_refused_until_they_are_given(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_without_secrets(config_with("abc")))
    with pytest.raises(
        UsageError, match=r"place of data\.args\.token the config.*with --data\.args\.token, or"
    ) as refused:
        load_config(["--config", str(path)])
    assert clean_text(str(refused.value), {}) == str(refused.value)
    config = load_config(["--config", str(path), "--data.args.token", "abc"])
    assert config.data.args == {"token": "abc", "size": 3}


def test_it_does_not_import_torch(tmp_path) -> None:
    program = "import sys, distloop.config.secrets; print('torch' in sys.modules)"
    assert command([sys.executable, "-c", program], tmp_path).stdout.strip() == "False"


# Space stands for what separates them, ~ for a space.
NASTY = """a key= key=' key=" key=\\ key=) :// ://a: ://a:b@ eyJ -eyJ eyJaaaa. sk- hf_ gho_a Bearer~ ?sig= -----BEGIN~
-----BEGIN~PRIVATE~KEY----- - . \\ key=f( key:str~ _key --key~ aB 0a @ key='''~ * ,; ~"""


def test_no_text_takes_much_longer_than_others(tmp_path) -> None:
    """Backtracking would take minutes or days, and end in the limit of the process."""
    program = "import sys; from distloop.config.secrets import clean_text\n"
    program += "for text in eval(sys.stdin.read()): clean_text(text, {})"
    texts = [word.replace("~", " ") * (2**18 // len(word)) for word in NASTY.split()]
    texts += ["\n" * 2**18, "key:\n" * 2**16, 'key="a"' + '+"a"' * 2**16]
    done = subprocess.run([sys.executable, "-c", program], input=repr(texts), text=True, timeout=120, check=False)
    assert done.returncode == 0
