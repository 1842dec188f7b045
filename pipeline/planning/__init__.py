"""What a run will take, before it is paid for: `work`, `memory` (and disk), `pace`; `plan` puts them together."""
