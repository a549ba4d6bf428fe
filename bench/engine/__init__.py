"""What every suite shares: cases, their truth, interleaved rounds, memory, the results file."""
