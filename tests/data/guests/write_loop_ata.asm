; A 512-byte guest that writes sector 8 of the primary IDE disk for ever by ATA PIO and ignores errors.
;
; With the disk's policy `report` every write is one I/O error: a storm of thousands a second.
; Assembled with -DTICK it sleeps until the next timer tick after each write: 18.2 errors a second. The disk's
; own interrupt is off then (nIEN), as each error would end the sleep at once.
bits 16
org 0x7c00
start:
  cli
  xor ax, ax
  mov ds, ax
  mov ss, ax
  mov sp, 0x7c00
%ifdef TICK
  mov dx, 0x3f6
  mov al, 0x02
  out dx, al
%endif
again:
%ifdef TICK
  sti
  hlt
  cli
%endif
  mov dx, 0x1f6
  mov al, 0xe0
  out dx, al
  mov dx, 0x1f2
  mov al, 1
  out dx, al
  mov dx, 0x1f3
  mov al, 8
  out dx, al
  mov dx, 0x1f4
  xor al, al
  out dx, al
  mov dx, 0x1f5
  out dx, al
  mov dx, 0x1f7
  mov al, 0x30
  out dx, al
wait_drq:
  in al, dx
  test al, 0x80
  jnz wait_drq
  test al, 0x01
  jnz again
  test al, 0x08
  jz wait_drq
  mov cx, 256
  xor si, si
  mov dx, 0x1f0
  rep outsw
  mov dx, 0x1f7
wait_done:
  in al, dx
  test al, 0x80
  jnz wait_done
  jmp again
times 510-($-$$) db 0
dw 0xaa55
