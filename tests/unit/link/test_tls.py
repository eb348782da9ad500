import datetime as dt
import stat

import pytest

from fedlearn.errors import TlsError
from fedlearn.link.tls import Identity, Role, TlsBundle, create_authority, issue


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return create_authority(tmp_path_factory.mktemp("ca"))


def test_a_bundle_says_who_it_is(authority, tmp_path):
    bundle = TlsBundle.load(issue(authority, "cleveland", Role.CLIENT, tmp_path))
    assert bundle.identity == Identity(Role.CLIENT, "cleveland")
    assert bundle.identity.uri == "fedlearn://client/cleveland"


def test_keys_are_the_owners_alone_and_in_no_repr(authority, tmp_path):
    bundle = TlsBundle.load(issue(authority, "a", Role.CLIENT, tmp_path))
    for key in (tmp_path / "key.pem", authority / "ca.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "PRIVATE" not in repr(bundle)
    assert "CERTIFICATE" not in repr(bundle)
    assert b"PRIVATE" in bundle.key_pem


def test_issuing_again_replaces_the_files(authority, tmp_path):
    first = TlsBundle.load(issue(authority, "a", Role.CLIENT, tmp_path))
    second = TlsBundle.load(issue(authority, "b", Role.CLIENT, tmp_path))
    assert first.key_pem != second.key_pem
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


def test_an_authority_is_never_overwritten(authority):
    with pytest.raises(TlsError, match="exists"):
        create_authority(authority)


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
def test_a_missing_file_is_named(authority, tmp_path, name):
    issue(authority, "a", Role.CLIENT, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(TlsError, match=f"{name}: no such file"):
        TlsBundle.load(tmp_path)


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
def test_a_damaged_file_is_named(authority, tmp_path, name):
    issue(authority, "a", Role.CLIENT, tmp_path)
    (tmp_path / name).write_text("nothing")
    with pytest.raises(TlsError, match=f"{name}: not "):
        TlsBundle.load(tmp_path)


def test_a_file_that_cannot_be_read_is_named(authority, tmp_path):
    issue(authority, "a", Role.CLIENT, tmp_path)
    (tmp_path / "key.pem").unlink()
    (tmp_path / "key.pem").mkdir()
    with pytest.raises(TlsError, match=r"key\.pem: cannot be read"):
        TlsBundle.load(tmp_path)


def test_an_expired_certificate_is_refused(authority, tmp_path):
    issue(authority, "a", Role.CLIENT, tmp_path, days=1, not_before=dt.datetime.now(dt.UTC) - dt.timedelta(days=2))
    with pytest.raises(TlsError, match="expired on"):
        TlsBundle.load(tmp_path)


def test_a_certificate_from_the_future_is_refused(authority, tmp_path):
    issue(authority, "a", Role.CLIENT, tmp_path, not_before=dt.datetime.now(dt.UTC) + dt.timedelta(days=2))
    with pytest.raises(TlsError, match="not valid before"):
        TlsBundle.load(tmp_path)


def test_another_authoritys_certificate_is_refused(authority, tmp_path):
    issue(authority, "a", Role.CLIENT, tmp_path / "a")
    (tmp_path / "a" / "ca.pem").write_bytes((create_authority(tmp_path / "other") / "ca.pem").read_bytes())
    with pytest.raises(TlsError, match=r"not signed by ca\.pem"):
        TlsBundle.load(tmp_path / "a")


def test_another_certificates_key_is_refused(authority, tmp_path):
    issue(authority, "a", Role.CLIENT, tmp_path / "a")
    issue(authority, "b", Role.CLIENT, tmp_path / "b")
    (tmp_path / "a" / "key.pem").write_bytes((tmp_path / "b" / "key.pem").read_bytes())
    with pytest.raises(TlsError, match="does not belong"):
        TlsBundle.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["", "A", "a/b", "-a", "a.", "a" * 65, "ä", "a b"])
def test_names_that_could_be_misread_are_refused(authority, tmp_path, name):
    with pytest.raises(TlsError, match="expected 1 to 64"):
        issue(authority, name, Role.CLIENT, tmp_path)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://client/a"],
        ["fedlearn://admin/a"],
        ["fedlearn://client/"],
        ["fedlearn://client/a", "fedlearn://client/b"],
        ["fedlearn://client/A"],
    ],
    ids=str,
)
def test_a_certificate_names_exactly_one_identity(uris):
    with pytest.raises(TlsError):
        Identity.from_uris(uris)
