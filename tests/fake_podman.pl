#!/usr/bin/perl
# The command `podman` of tests: hands its command line to the engine of files that the test holds open (support.FakeEngine) and
# says what that answers.  In Perl, which every Debian has, because a Python takes ten times as long to start.
use strict;

my $door;
socket($door, 1, 1, 0) && connect($door, pack("S a*", 1, "$ENV{FAKE_PODMAN}/door")) or die "the engine of files is gone: $!\n";
syswrite($door, join("\0", getppid(), @ARGV));
shutdown($door, 1);
my $head = <$door>;
exit system("sleep", "600") if $head eq "hang\n";
my ($code, $length) = split " ", $head;
local $/;
my $rest = <$door>;
print STDOUT substr($rest, 0, $length);
print STDERR substr($rest, $length);
exit $code;
