"""AWS KMS as moto plays it: aliases as the list of versions, races, policy, refusals."""

import json
import re
from pathlib import Path
from typing import Any

import boto3
import pytest

import kmskit
from filigrane.errors import KmsError, KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms.aws import AwsPlace, AwsRoot
from filigrane.kms.opening import create_kms, open_kms

DOCUMENT = Path(__file__).parents[2] / "docs" / "kms.md"


def sdk(aws: kmskit.Aws, service: str = "kms") -> Any:
    return boto3.client(service, endpoint_url=aws.backend, region_name="eu-central-1")


def test_a_version_is_two_keys_named_by_aliases(aws: kmskit.Aws) -> None:
    settings, kms = aws.fresh()
    kms.rotate()
    client = sdk(aws)
    pages = client.get_paginator("list_aliases").paginate()
    found = {
        alias["AliasName"].removeprefix(f"alias/{settings['prefix']}/"): alias["TargetKeyId"]
        for page in pages
        for alias in page["Aliases"]
        if alias["AliasName"].startswith(f"alias/{settings['prefix']}/")
    }
    assert set(found) == {"mac/1", "wrap/1", "mac/2", "wrap/2"}
    kinds = {name: client.describe_key(KeyId=key)["KeyMetadata"] for name, key in found.items()}
    assert kinds["mac/2"]["KeySpec"] == "HMAC_256"
    assert kinds["mac/2"]["KeyUsage"] == "GENERATE_VERIFY_MAC"
    assert kinds["wrap/2"]["KeyUsage"] == "ENCRYPT_DECRYPT"
    tags = client.list_resource_tags(KeyId=found["mac/2"])["Tags"]
    assert {tag["TagKey"]: tag["TagValue"] for tag in tags} == {
        "filigrane:root": settings["prefix"],
        "filigrane:version": "2",
    }
    client.close()


def test_prefixes_do_not_see_each_other(aws: kmskit.Aws) -> None:
    settings, kms = aws.fresh()
    inner = create_kms(settings | {"prefix": settings["prefix"] + "/mac"})
    inner.rotate()
    assert kms.versions() == (1,) and inner.versions() == (1, 2)
    with pytest.raises(KmsError, match="already"):
        create_kms(settings)
    with pytest.raises(KmsError, match="no root"):
        open_kms(settings | {"prefix": settings["prefix"][:-1]})
    inner.close()


def test_a_rotation_that_died_between_its_keys_is_finished(aws: kmskit.Aws) -> None:
    settings, kms = aws.fresh()
    client = sdk(aws)
    key = client.create_key(KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["KeyId"]
    client.create_alias(AliasName=f"alias/{settings['prefix']}/wrap/2", TargetKeyId=key)
    client.close()
    assert kms.versions() == (1,)
    assert kms.rotate() == 2
    blob = kms.wrap(_Secret(b"data"), b"context")
    assert kms.unwrap(blob, b"context").reveal() == b"data"


def test_a_version_is_there_only_when_both_its_keys_are(
    aws: kmskit.Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kms = aws.fresh()
    add, made = AwsRoot._add_key, list[str]()

    def dying(self: AwsRoot, alias: str, usage: str, kind: str, version: int) -> None:
        if made:
            raise KmsUnavailable("gone")
        made.append(alias)
        add(self, alias, usage, kind, version)

    monkeypatch.setattr(AwsRoot, "_add_key", dying)
    with pytest.raises(KmsUnavailable):
        kms.rotate()
    assert len(made) == 1 and kms.versions() == (1,)
    blob = kms.wrap(_Secret(b"data"), b"context")
    assert kms.unwrap(blob, b"context").reveal() == b"data"


@pytest.mark.usefixtures("aws")
def test_a_key_whose_answer_is_lost_is_not_made_twice() -> None:
    asked: list[str] = []
    listed = {"Aliases": [{"AliasName": "alias/filigrane/mac/1", "TargetKeyId": "k"}]}

    def answer(method: str, path: str) -> kmskit.Answer:
        asked.append(seen[-1]["X-Amz-Target"].rpartition(".")[2])
        if asked[-1] == "ListAliases":
            return kmskit.as_json(200, listed | {"Truncated": False})
        raise ConnectionError("gone")

    with kmskit.serving(answer) as (address, seen):
        kms = AwsRoot.open(AwsPlace(region="eu-central-1", endpoint=address, timeout_s=2))
        for call in (kms.rotate, lambda: kms.mac(1, b"m")):
            with pytest.raises(KmsUnavailable):
                call()
        kms.close()
    assert asked.count("CreateKey") == 1
    assert asked.count("GenerateMac") == 2, "what changes nothing is asked for again"


def test_many_aliases_of_others(aws: kmskit.Aws) -> None:
    settings, kms = aws.fresh()
    client = sdk(aws)
    key = client.create_key()["KeyMetadata"]["KeyId"]
    for number in range(101):
        client.create_alias(AliasName=f"alias/a{settings['prefix']}/{number}", TargetKeyId=key)
    client.close()
    assert kms.rotate() == 2 and kms.versions() == (1, 2)


def test_the_documented_permissions_are_enough(
    aws: kmskit.Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    (policy,) = re.findall(r"^```json\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    iam = sdk(aws, "iam")
    iam.create_user(UserName="filigrane")
    iam.put_user_policy(UserName="filigrane", PolicyName="kms", PolicyDocument=policy)
    key = iam.create_access_key(UserName="filigrane")["AccessKey"]
    first = json.loads(policy)
    first["Statement"] = first["Statement"][:1]
    iam.create_user(UserName="no-rotation")
    fewer = json.dumps(first)
    iam.put_user_policy(UserName="no-rotation", PolicyName="kms", PolicyDocument=fewer)
    other = iam.create_access_key(UserName="no-rotation")["AccessKey"]
    iam.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    aws._enforce(0)
    try:
        settings, kms = aws.fresh()
        assert kms.rotate() == 2
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", other["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", other["SecretAccessKey"])
        mine = open_kms(settings)
        assert mine.mac(1, b"m").reveal() == kms.mac(1, b"m").reveal()
        blob = mine.wrap(_Secret(b"data"), b"context")
        assert mine.unwrap(blob, b"context").reveal() == b"data"
        with pytest.raises(KmsError, match="permissions"):
            mine.rotate()
        mine.close()
    finally:
        aws._enforce(1 << 40)


@pytest.mark.parametrize(
    ("code", "unavailable"),
    [
        ("ThrottlingException", True),
        ("KMSInternalException", True),
        ("DependencyTimeoutException", True),
        ("AccessDeniedException", False),
        ("ExpiredTokenException", False),
        ("DisabledException", False),
        ("KMSInvalidStateException", False),
        ("canary <script>", False),
    ],
)
@pytest.mark.usefixtures("aws")
def test_what_a_refusal_means(code: str, unavailable: bool) -> None:
    said = {"__type": code, "message": "arn:aws:kms:eu-central-1:123456789012:key/canary"}
    with (
        kmskit.serving(lambda *_: kmskit.as_json(400, said)) as (address, _),
        pytest.raises(KmsError) as caught,
    ):
        AwsRoot.open(AwsPlace(region="eu-central-1", endpoint=address, timeout_s=2))
    assert isinstance(caught.value, KmsUnavailable) is unavailable
    assert "canary" not in str(caught.value) and "123456789012" not in str(caught.value)


@pytest.mark.usefixtures("aws")
def test_answers_that_are_nonsense() -> None:
    listed = {
        "Aliases": [{"AliasName": "alias/filigrane/mac/1", "TargetKeyId": "k"}],
        "Truncated": False,
    }
    said: list[kmskit.Answer] = [kmskit.as_json(200, listed)]
    with kmskit.serving(lambda *_: said[0]) as (address, _):
        kms = AwsRoot.open(AwsPlace(region="eu-central-1", endpoint=address, timeout_s=2))
        for more in ({}, {"Mac": "AAAA"}, {"CiphertextBlob": ""}, {"Plaintext": None}):
            said[0] = kmskit.as_json(200, listed | more)
            with pytest.raises(KmsError):
                kms.mac(1, b"m")
            with pytest.raises(KmsError):
                kms.wrap(_Secret(b"data"), b"context")
            with pytest.raises(KmsError):
                kms.unwrap(b"fgw1\x03\x00\x00\x00\x01blob", b"context")
        for body in (b"<html>", b"", b"[]"):
            said[0] = (200, {}, body)
            with pytest.raises(KmsError):
                kms.versions()
        kms.close()


def test_settings_that_the_sdk_does_not_take(
    aws: kmskit.Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = aws.settings["endpoint"]
    with pytest.raises(KmsError, match="profile"):
        AwsRoot.open(AwsPlace(region="eu-central-1", profile="none", endpoint=endpoint))
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    with pytest.raises(KmsError, match="region"):
        AwsRoot.open(AwsPlace(endpoint=endpoint))
    with pytest.raises(KmsError, match="aws first"):
        AwsRoot.open(AwsPlace(prefix="aws/x", region="eu-central-1", endpoint=endpoint))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(KmsError, match="credentials"):
        AwsRoot.open(AwsPlace(region="eu-central-1", endpoint=endpoint, timeout_s=1))
