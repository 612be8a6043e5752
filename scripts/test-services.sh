#!/usr/bin/env bash
# Name what the tests can use beyond Python, so that a skipped test is no surprise.
# The first release needs no server; strace serves the kill sweep's "at the Nth system call" mode.
set -u
root=${NIGHTDESK_RECORDINGS:-../shared/data}
[ -d "$root" ] && echo "recordings: $root" || echo "recordings: none (tests that replay them are skipped; set NIGHTDESK_RECORDINGS)"
if ! command -v strace >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get install -y -qq strace >/dev/null 2>&1 || true
fi
command -v strace >/dev/null && echo "strace: yes" || echo "strace: no (kills at system calls are skipped; kills at random instants run)"
