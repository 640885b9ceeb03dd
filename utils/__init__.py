"""What every part needs: options, metrics, CRF, transforms, reports. Imports nothing of ours.

The processes of the CRF import `vision.crf` and, with the programs, `config`, `files`, `errors` and
`progress`: these import no torch.
"""
