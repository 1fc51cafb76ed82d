"""Which URLs a webhook may have, and which addresses are public."""

import ipaddress

import pytest

from server.errors import Invalid
from server.webhooks.target import ILL_FORMED, NOT_PUBLIC, Target, is_public, parse_url

ALLOWED = "localhost, Receiver.internal ,10.1.2.3,[::1]"

ILL = [
    *(
        "",
        "a.example/hook",
        "ftp://a.example/",
        "//a.example/",
        "https:a.example",
        "https:///hook",
        "https:// a.example/",
    ),
    *(
        "https://a.example/ ",
        "https://a.example\t/",
        "https://a.example/\n",
        "\nhttps://a.example/",
    ),
    *("https://user@a.example/", "https://user:password@a.example/", "https://a.example@10.0.0.1/"),
    *("https://a.example/#fragment", "https://a.example#", "https://a.example\\@10.0.0.1/", "https://a.example/\\"),
    *("https://a.example:0/", "https://a.example:65536/", "https://a.example:/", "https://a.example:8a/"),
    *("https://-a.example/", "https://a..example/", "https://a.example./", "https://.example/", "https://a_-.example/"),
    *(f"https://{'a' * 64}.example/", f"https://{'a.' * 127}example/", f"https://a.example/{'a' * 2048}"),
    *(
        "https://ä.example/",
        "https://a.example/ä",
        "https://a.example/%zz",
        "https://a.example/%",
        "https://a%2eexample/",
    ),
    *("https://[::1/", "https://::1/", "https://[fe80::1%25eth0]/", "https://[::1]x/", "https://１２７.0.0.1/"),
]
PRIVATE = [
    *(
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "255.255.255.255",
    ),
    *("192.0.0.1", "192.0.0.9", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("239.255.255.255", "240.0.0.1"),
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:127.0.0.1", "::ffff:8.8.8.8"),
    *("64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::8.8.8.8", "2002:7f00:1::", "2002:808:808::", "100::1"),
    *("2001::1", "2001:0:7f00:1::", "2001:20::1", "2001:db8::1", "3fff::1", "5f00::1", "fc00::1", "fd12:3456::1"),
    *("fe80::1", "fec0::1", "ff02::1", "4000::1", "fd00:ec2::254"),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808"]
NUMBERS = [
    "2130706433",
    "017700000001",
    "0x7f000001",
    "127.1",
    "0177.0.0.1",
    "0x7f.1",
    "127.0.0.0x1",
    "1.2.3.4.5",
    "a.1",
]
NAMES = ["localhost", "metadata", "receiver.internal", "printer.local", "a.localhost", "METADATA.GOOGLE.INTERNAL"]


def refusal(url: str, hosts: str = "") -> str:
    """Why a URL is refused."""
    with pytest.raises(Invalid) as refused:
        parse_url(url, hosts)
    ((name, message),) = refused.value.fields
    assert name == "webhook"
    return message


@pytest.mark.parametrize("url", ILL)
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    assert refusal(url, hosts=ALLOWED) == ILL_FORMED


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert refusal(f"https://[{address}]/" if ":" in address else f"https://{address}/") == NOT_PUBLIC


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_accepted(address: str) -> None:
    url = f"https://[{address}]/" if ":" in address else f"https://{address}/"

    assert parse_url(url, "").host == str(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", [*NUMBERS, *NAMES])
def test_other_notations_of_addresses_and_names_that_nobody_can_register_are_refused(host: str) -> None:
    assert refusal(f"https://{host}/") == NOT_PUBLIC


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("HTTPS://A.Example", Target("https", "a.example", 443, "/", False)),
        ("https://a.example:8443/b?c=d&e=%2F", Target("https", "a.example", 8443, "/b?c=d&e=%2F", False)),
        ("https://a.example?b", Target("https", "a.example", 443, "/?b", False)),
        ("http://localhost:9/", Target("http", "localhost", 9, "/", True)),
        ("https://receiver.INTERNAL/", Target("https", "receiver.internal", 443, "/", True)),
        ("http://10.1.2.3/", Target("http", "10.1.2.3", 80, "/", True)),
        ("http://[0:0::1]:80/", Target("http", "::1", 80, "/", True)),
    ],
)
def test_a_url_in_its_parts(url: str, target: Target) -> None:
    assert parse_url(url, ALLOWED) == target


def test_http_is_for_hosts_that_the_setting_names() -> None:
    assert refusal("http://a.example/", ALLOWED).startswith("webhook must begin with https://")
    assert parse_url("http://a.example/", f"{ALLOWED},a.example").trusted


@pytest.mark.parametrize(
    ("url", "said"), [("https://a.example", "a.example"), ("https://[2606:4700::1]:81", "[2606:4700::1]:81")]
)
def test_the_authority_is_as_in_the_url(url: str, said: str) -> None:
    assert parse_url(url, "").authority == said
