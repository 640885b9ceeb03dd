"""What every part needs: options, metrics, CRF, transforms, reports. Imports nothing of ours.

The CRF processes import `crf` and `upsampling`, and with the programs `cli`, `optionfile`, `options`, `files`
and `errors`: these import no torch.
"""
