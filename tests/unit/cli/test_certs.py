"""Certificates that the command line makes."""

import json

from fedlearn.cli import main
from fedlearn.cli.certs import DEVELOPMENT_NOTICE, coordinator_bundles
from fedlearn.link.tls import Role, TlsBundle


def test_a_first_start_makes_an_authority_and_two_bundles_and_a_second_nothing(tmp_path):
    state = tmp_path / "state"
    server, made = coordinator_bundles(state, ("fl.example.org",))
    assert made
    assert TlsBundle.load(server).identity.role is Role.SERVER
    assert TlsBundle.load(state / "tls" / "operator").identity.role is Role.OPERATOR
    before = (server / "cert.pem").read_bytes()
    assert coordinator_bundles(state, ()) == (server, False)
    assert (server / "cert.pem").read_bytes() == before


def test_the_names_that_sites_dial_are_in_the_certificate(tmp_path):
    from cryptography import x509

    server, _ = coordinator_bundles(tmp_path, ("fl.example.org", "10.0.0.7"))
    names = x509.load_pem_x509_certificate((server / "cert.pem").read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert "fl.example.org" in names.value.get_values_for_type(x509.DNSName)
    assert "10.0.0.7" in map(str, names.value.get_values_for_type(x509.IPAddress))


def test_issue_writes_a_bundle_and_warns(capsys, tmp_path):
    coordinator_bundles(tmp_path, ())
    assert main(["certs", "issue", "cleveland", "--state", str(tmp_path)]) == 0
    assert DEVELOPMENT_NOTICE in capsys.readouterr().out
    bundle = TlsBundle.load(tmp_path / "tls" / "clients" / "cleveland")
    assert (bundle.identity.role, bundle.identity.name) == (Role.CLIENT, "cleveland")
    assert (tmp_path / "tls" / "clients" / "cleveland" / "key.pem").stat().st_mode & 0o077 == 0


def test_roles_go_to_their_own_folders(capsys, tmp_path):
    coordinator_bundles(tmp_path, ())
    assert main(["certs", "issue", "ada", "--role", "operator", "--state", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert TlsBundle.load(report["folder"]).identity.role is Role.OPERATOR
    assert main(["certs", "issue", "bo", "--state", str(tmp_path), "--out", str(tmp_path / "bo")]) == 0
    capsys.readouterr()
    assert TlsBundle.load(tmp_path / "bo").identity.name == "bo"


def test_a_name_that_is_no_name_is_refused(capsys, tmp_path):
    coordinator_bundles(tmp_path, ())
    assert main(["certs", "issue", "Not A Name", "--state", str(tmp_path)]) == 6
    assert "a-z, 0-9" in capsys.readouterr().err
